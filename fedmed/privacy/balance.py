"""What a ledger's records amount to: who has spent what. Pure arithmetic, which `verify` does again from the events."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import LedgerUnusable
from fedmed.privacy.accounting import Spent, spent
from fedmed.privacy.cohort import EVERYONE, Cohort, persons
from fedmed.privacy.rdp_filter import Filter, charged, curve_of
from fedmed.types import PrivacyEvent

Events = Sequence[PrivacyEvent]
Table = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Charge:
    """A reservation as it counts now: in full until it is settled, and by what was done afterwards."""

    run: str
    round: int
    cohort: str
    events: tuple[PrivacyEvent, ...]
    token: str  # SHA-256 of what only the process that reserved knows
    whole: bool = False  # judged as one fixed schedule: nothing of it is ever given back
    settled: bool = False


class Balance:
    """The state of a ledger. It only ever grows by `apply`."""

    def __init__(self) -> None:
        """Of an empty ledger."""
        self.delta = 0.0
        self.orders: tuple[float, ...] = ()
        self.charges: dict[int, Charge] = {}
        self.caps: dict[str, float] = {}  # the lowest ε that applied to a run since it began
        self.cohorts: dict[str, Cohort] = {}  # those whose members are known
        self._steps: dict[str, Counter[PrivacyEvent]] = defaultdict(Counter)  # by cohort: single events, how many
        self._most: Counter[str] = Counter()  # by cohort: under how many ids somebody was in it then
        self._table: tuple[tuple[str, ...], Table] | None = None

    def know(self, cohorts: Iterable[Cohort]) -> None:
        """Take note of who is in these cohorts."""
        for cohort in cohorts:
            if not cohort.is_everyone and cohort.name not in self.cohorts:
                self.cohorts[cohort.name] = cohort
                self._table = None

    def apply(self, sequence: int, body: Mapping[str, Any]) -> None:
        """Add what one record says.

        Raises:
            LedgerUnusable: it says something impossible.
        """
        try:
            match body["kind"]:
                case "opened":
                    self.delta, self.orders = float(body["delta"]), tuple(map(float, body["orders"]))
                case "reserved":
                    charge = Charge(
                        run=str(body["run"]),
                        round=int(body["round"]),
                        cohort=str(body["cohort"]),
                        events=read_events(body["events"]),
                        token=str(body["token"]),
                        whole=bool(body["whole"]),
                    )
                    self.charges[sequence] = charge
                    self._most[charge.cohort] = max(int(body.get("most", 1)), self._most[charge.cohort])
                    self.caps[charge.run] = min(float(body["cap"]), self.caps.get(charge.run, np.inf))
                    self._add(charge, 1)
                case "settled":
                    reserved, done = self.charges[int(body["reservation"])], read_events(body["events"])
                    if (
                        reserved.settled
                        or not within(done, reserved.events)
                        or (reserved.whole and done != reserved.events)
                    ):
                        raise ValueError("settled")
                    self._add(reserved, -1)
                    charge = replace(reserved, events=done, settled=True)
                    self.charges[int(body["reservation"])] = charge
                    self._add(charge, 1)
        except (KeyError, TypeError, ValueError) as error:
            text = f"record {sequence} of the ledger cannot be understood ({type(error).__name__})"
            raise LedgerUnusable(text, rule="ledger.record") from None

    def filter(self, epsilon: float) -> Filter:
        """The gate with a cap on ε, at this ledger's δ and orders."""
        return Filter(epsilon=epsilon, delta=self.delta, orders=self.orders)

    def totals(self) -> NDArray[np.float64]:
        """(kinds of person, orders) what persons have spent; the first is one whom no manifest named."""
        return self._of(*self.table())

    def meeting(self, cohort: Cohort) -> tuple[NDArray[np.float64], Table]:
        """What persons of a known cohort have spent, and how often each is in it: (kinds, orders), (kinds,)."""
        names, table = self.table()
        if cohort.is_everyone:
            return self._of(names, table), self._times(EVERYONE, names, table)
        times = table[:, names.index(cohort.name)]
        return self._of(names, table[times > 0]), times[times > 0]

    def worst(self) -> list[PrivacyEvent]:
        """The events of the person who has spent most, as they are charged."""
        return self._charged_to(int(self.bounds().argmax()))

    def bounds(self, *, delta: float | None = None) -> NDArray[np.float64]:
        """(kinds,) ε of each kind of person by the filter, at the ledger's δ or a smaller one."""
        gate = replace(self.filter(np.inf), delta=delta or self.delta)
        return np.array([gate.epsilon_of(total) for total in self.totals()])

    def spent(self, *, delta: float | None = None) -> Spent:
        """What the person who has spent most has spent, at the ledger's δ or a smaller one.

        A later schedule may follow from what an earlier one gave, so ε is then the filter's. A single one was fixed
        before it began, so for who has no other it is PRV's where that is less. `epsilon_rdp` is always the filter's.
        """
        delta = delta or self.delta
        bounds, several = self.bounds(delta=delta), self._schedules() > 1
        most = Spent(epsilon=float(bounds[several].max(initial=0.0)), accountant="rdp", epsilon_rdp=float(bounds.max()))
        for kind in np.flatnonzero(~several)[np.argsort(-bounds[~several], kind="stable")].tolist():
            if bounds[kind] <= most.epsilon:  # no schedule costs more than by the filter, so nobody after that does
                break
            cost = _cost(tuple(self._charged_to(kind)), delta)
            if cost.epsilon > most.epsilon:
                most = replace(most, epsilon=cost.epsilon, accountant=cost.accountant)
        return most

    def _schedules(self) -> Table:
        """(kinds,) how many reservations touched each kind of person; marks of rounds reserve nothing."""
        names, table = self.table()
        plans = Counter(charge.cohort for charge in self.charges.values() if any(each.steps for each in charge.events))
        found = np.zeros(len(table), np.int64)
        for name, count in plans.items():
            found += count * (self._times(name, names, table) > 0)
        return found

    def _charged_to(self, kind: int) -> list[PrivacyEvent]:
        """The events of a kind of person, by its row of the table."""
        names, table = self.table()
        row, found = table[kind], Counter[PrivacyEvent]()
        for name, steps in self._steps.items():
            times = self._times(name, names, row[None])[0]
            for event, count in steps.items():
                if times and count:
                    found[charged(event, int(times))] += count
        return [replace(event, steps=count) for event, count in found.items()]

    def apart(self, some: Collection[str], others: Collection[str]) -> bool:
        """Whether nobody is both in one of some cohorts and in one of others; who is unknown may be in any."""
        names, table = self.table()
        if not {*some, *others} <= set(names):
            return False
        in_some, in_others = (table[:, [names.index(name) for name in group]].any(axis=1) for group in (some, others))
        return not (in_some & in_others).any()

    def most_often(self, cohort: str) -> int:
        """How often the person who is in a cohort most often is in it; of unknown members, as recorded."""
        names, table = self.table()
        return max(1, int(self._times(cohort, names, table).max()))

    def table(self) -> tuple[tuple[str, ...], Table]:
        """The names of the known cohorts, and how often each kind of person is in each of them."""
        if self._table is None:
            names = tuple(sorted(self.cohorts))
            found = persons([self.cohorts[name] for name in names])
            self._table = names, np.concatenate([np.zeros((1, len(names)), np.int64), found])
        return self._table

    def _of(self, names: tuple[str, ...], rows: Table) -> NDArray[np.float64]:
        total = np.zeros((len(rows), len(curve_of([]))))
        for name, steps in self._steps.items():
            times = self._times(name, names, rows)
            for often in np.unique(times[times > 0]).tolist():
                events = [replace(event, steps=count) for event, count in steps.items()]
                total[times == often] += curve_of(events, times=often)
        return total

    def _times(self, name: str, names: tuple[str, ...], rows: Table) -> Table:
        """(kinds,) how often each is in a cohort.

        One whose members are not known may be anybody, as often as somebody was when it was charged; in the whole site
        somebody may be as often as in any cohort.
        """
        if name in names:
            return rows[:, names.index(name)]
        if name == EVERYONE:
            most = max([int(self.table()[1].max(initial=1)), *self._most.values()])
        else:
            most = max(self._most[name], 1)
        return np.full(len(rows), most, np.int64)

    def _add(self, charge: Charge, sign: int) -> None:
        for event in charge.events:
            self._steps[charge.cohort][charged(event, 1)] += sign * event.steps


@lru_cache(maxsize=64)  # of long plans it takes a second, and the mark of a round changes nothing
def _cost(events: tuple[PrivacyEvent, ...], delta: float) -> Spent:
    return spent(events, delta=delta)


def known_cohorts(members: Mapping[str, bytes]) -> list[Cohort]:
    """The cohorts whose members a ledger holds.

    Raises:
        LedgerUnusable: members do not have the digest that is their name.
    """
    found = [Cohort.of_members(each) for each in members.values()]
    if [cohort.name for cohort in found] != list(members):
        raise LedgerUnusable("a cohort of the ledger was edited; run fedmed ledger verify", rule="ledger.cohort")
    return found


def within(done: Events, reserved: Events) -> bool:
    """Whether what was done is part of what was reserved: the same events, each with as many steps or fewer."""
    return len(done) == len(reserved) and all(
        0 <= one.steps <= other.steps and replace(one, steps=other.steps, cohort=other.cohort) == other
        for one, other in zip(done, reserved, strict=True)
    )


def written_events(events: Events) -> list[dict[str, Any]]:
    """Events as a record holds them."""
    return [asdict(event) for event in events]


def read_events(values: Iterable[Mapping[str, Any]]) -> tuple[PrivacyEvent, ...]:
    """The inverse of `written_events`."""
    return tuple(PrivacyEvent(**value) for value in values)
