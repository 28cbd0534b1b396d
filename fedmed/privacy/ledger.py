"""The hospital's own account of what its patients have spent. Ask it before a gradient is computed; tell it afterwards.

A record is appended and never changed: signed, chained, and on disk, at the witness first, before anybody acts on it.
So killed at any moment the ledger says at least what was spent. `reserve` charges a whole plan; `settle` gives back
steps that did not run, and only to the process that reserved them: what a killed process did stays charged in full.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmed.errors import BudgetExhausted, LedgerUnusable, PolicyRefused
from fedmed.privacy.accounting import Spent
from fedmed.privacy.balance import Balance, Charge, known_cohorts, within, written_events
from fedmed.privacy.chain import EMPTY, Anchor, Record, appended, faults, is_signed, read
from fedmed.privacy.chain_file import Witness, forked, witness_path
from fedmed.privacy.cohort import Cohort
from fedmed.privacy.keys import SiteKeys
from fedmed.privacy.policy import SitePolicy
from fedmed.privacy.rdp_filter import orders_for
from fedmed.privacy.refusals import check_plan, over_budget, passes
from fedmed.privacy.storage import Rows, Storage
from fedmed.types import PrivacyEvent, now

CHAIN, DATABASE = "ledger", "ledger.sqlite"


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """Leave to do what `events` say. Only the process that holds it can settle it."""

    sequence: int  # of its record
    run: str
    round: int
    events: tuple[PrivacyEvent, ...]
    warning: str = ""  # what the site should know though it is allowed
    token: str = field(repr=False)


class Ledger:
    """One site's ledger. Several processes may hold it at once; a forked process may go on using it."""

    def __init__(self, folder: Path, keys: SiteKeys, policy: SitePolicy) -> None:
        """Nothing is read or written; `open` is the way in."""
        self.keys, self.policy = keys, policy
        self._storage = Storage(folder / DATABASE)
        self._witness = Witness(path=witness_path(folder, keys.public, policy.privacy.witness), chain=CHAIN)
        self._balance = Balance()
        self._head = EMPTY

    @classmethod
    def open(cls, folder: Path, *, keys: SiteKeys, policy: SitePolicy) -> Ledger:
        """Open a site's ledger, or begin it.

        Args:
            folder: where its database lies; apart from the keys.
            keys: of the site.
            policy: whose `[policy.privacy]` holds from now on. δ is fixed for ever when a ledger is begun.

        Raises:
            LedgerUnusable: it cannot be read or written, or it is not whole: `rule` says what was found.
            PolicyRefused: the policy names another δ than the ledger has.
        """
        if folder.resolve() in (keys.folder.resolve(), *keys.folder.resolve().parents):
            raise LedgerUnusable("the keys must not lie in the ledger's folder", rule="keys.folder")
        ledger = cls(folder, keys, policy)
        with ledger._storage.writing() as rows, ledger._witness.locked() as witness:
            ledger._refresh(rows, witness)
            if ledger._head == EMPTY:
                privacy = policy.privacy
                orders = list(orders_for(privacy.epsilon, privacy.delta))
                body = {"kind": "opened", "time": now(), "delta": privacy.delta, "orders": orders}
                ledger._append(rows, witness, [{**body, "public": keys.public.hex()}])
        ledger.refresh()
        if ledger._balance.delta != policy.privacy.delta:
            text = f"this ledger has δ = {ledger._balance.delta:g} for ever; the policy says {policy.privacy.delta:g}"
            raise PolicyRefused(text, rule="policy.privacy.delta")
        return ledger

    def reserve(self, run: str, round: int, events: Sequence[PrivacyEvent], cohort: Cohort) -> Reservation:
        """Charge a plan to a cohort, before anything is computed.

        Args:
            run: name of the run. The lowest cap on ε that applied since its first round is the run's.
            round: of it. Asking for a round again charges again: its noise would be new.
            events: the plan. What was decided beforehand belongs in one reservation.
            cohort: whom it may touch.

        Raises:
            BudgetExhausted: some patient would exceed the budget; the message offers what fits.
            PolicyRefused: an event is not allowed here, whatever the budget.
            LedgerUnusable: the ledger cannot be used.
        """
        warning = check_plan(events, cohort.patients, self._balance.delta, self.policy.privacy)
        events = tuple(replace(event, cohort=cohort.name) for event in events)
        token = secrets.token_hex(32)
        refusal: BudgetExhausted | None = None
        with self._storage.writing() as rows, self._witness.locked() as witness:
            self._refresh(rows, witness)
            bodies = self._introduced(rows, cohort)
            cap = min(self.policy.privacy.epsilon, self._balance.caps.get(run, float("inf")))
            totals, times = self._balance.meeting(cohort)
            gate = self._balance.filter(cap)
            refusal = over_budget(
                f'round {round} of "{run}"',
                events,
                totals,
                times,
                gate,
                pinned=cap < self.policy.privacy.epsilon,
            )
            if refusal is None:
                facts = {"run": run, "round": round, "cohort": cohort.name, "cap": cap, "token": _digest(token)}
                facts["whole"] = not passes(events, totals, times, gate)
                facts["most"] = int(times.max(initial=1))  # ids of one person, for when the members are lost
                bodies += [{"kind": "reserved", "time": now(), **facts, "events": written_events(events)}]
            head = self._append(rows, witness, bodies)  # who belongs together is kept even if the plan is refused
        self.refresh()
        if refusal is not None:
            raise refusal
        return Reservation(sequence=head.sequence, run=run, round=round, events=events, warning=warning, token=token)

    def settle(self, reservation: Reservation, events_done: Sequence[PrivacyEvent]) -> None:
        """Say what was done of a plan; the rest is given back, unless the plan was judged as one fixed schedule.

        Args:
            reservation: of this process. One that was lost with its process stays charged in full.
            events_done: the reserved events, each with as many steps as ran.

        Raises:
            PolicyRefused: more was done than reserved, or it is settled already, or another's.
            LedgerUnusable: the ledger cannot be used; the plan stays charged in full.
        """
        done = tuple(
            replace(event, cohort=event.cohort or mine.cohort)
            for event, mine in zip(events_done, reservation.events, strict=False)
        )
        with self._storage.writing() as rows, self._witness.locked() as witness:
            self._refresh(rows, witness)
            charge = self._balance.charges.get(reservation.sequence)
            if charge is None or charge.token != _digest(reservation.token) or charge.settled:
                raise PolicyRefused("this reservation is settled, or another process's", rule="ledger.settled-once")
            if len(done) != len(events_done) or not within(done, charge.events):
                raise PolicyRefused("more was done than was reserved", rule="ledger.done-within-reserved")
            done = charge.events if charge.whole else done
            body = {"kind": "settled", "time": now(), "reservation": reservation.sequence}
            self._append(rows, witness, [{**body, "events": written_events(done)}])
        self.refresh()

    def refresh(self) -> None:
        """Take up what this or another process has committed.

        Raises:
            LedgerUnusable: the ledger cannot be read, or is no longer the one that this process knows.
        """
        with self._storage.reading() as rows:
            self._follow(rows)

    @property
    def head(self) -> Anchor:
        """The newest record as this process knows it. It leaves with every update."""
        return self._head

    @property
    def delta(self) -> float:
        """The site's one δ."""
        return self._balance.delta

    @property
    def epsilon_rdp(self) -> float:
        """ε of the patient who has spent most, by the filter: quick, for every round."""
        return float(self._balance.bounds().max())

    @property
    def charges(self) -> Mapping[int, Charge]:
        """All reservations by their record's number, as they count now."""
        return self._balance.charges

    @property
    def has_noised_gradients(self) -> bool:
        """Whether some run has trained here with noise of the site's own."""
        return any(event.release == "gradients" for charge in self.charges.values() for event in charge.events)

    def spent(self, *, delta: float | None = None) -> Spent:
        """What the patient who has spent most has spent, at the site's δ or a smaller one; see `Balance.spent`."""
        return self._balance.spent(delta=delta)

    def apart(self, some: Collection[str], others: Collection[str]) -> bool:
        """Whether nobody is known to be, or could be, both in one of some cohorts and in one of others, by name."""
        return self._balance.apart(some, others)

    def most_often(self, cohort: str) -> int:
        """Under how many ids of a cohort one person is known, at most."""
        return self._balance.most_often(cohort)

    def close(self) -> None:
        """Close the database; the next call opens it again."""
        self._storage.close()

    def _introduced(self, rows: Rows, cohort: Cohort) -> list[dict[str, Any]]:
        """Keep who is in a cohort that is new, and give the record that says so."""
        if cohort.is_everyone or cohort.name in rows.names():
            return []
        rows.add_cohort(cohort.name, cohort.members)
        self._balance.know([cohort])
        facts = {"patients": cohort.patients, "digests": len(cohort.digests)}
        return [{"kind": "cohort", "time": now(), "name": cohort.name, **facts}]

    def _append(self, rows: Rows, witness: int, bodies: Sequence[Mapping[str, Any]]) -> Anchor:
        """Sign records and write them: to the witness, then here. What this process knows follows after the commit."""
        records: list[Record] = []
        for body in bodies:
            records.append(appended(CHAIN, records[-1].anchor if records else self._head, body, self.keys))
        if records:
            self._witness.extend(witness, records)
            rows.append(records[0].anchor.sequence, [record.line for record in records])
        return records[-1].anchor if records else self._head

    def _refresh(self, rows: Rows, witness: int) -> None:
        """Take up what other processes wrote, and make ledger and witness equal.

        Raises:
            LedgerUnusable: the chain does not hold, or ledger and witness are of two histories.
        """
        self._follow(rows)

        def hash_at(sequence: int) -> str:
            line = rows.line(sequence) if sequence else None
            return read(line).anchor.hash if line else EMPTY.hash

        lost = self._witness.newer(witness, self._head, hash_at)
        if lost:
            if not is_signed(CHAIN, lost[-1].anchor, self.keys.public):
                raise LedgerUnusable("the witness holds records that this site did not sign", rule="ledger.signature")
            rows.append(lost[0].anchor.sequence, [record.line for record in lost])
            self._follow(rows)
            gap = {"first": lost[0].anchor.sequence, "last": lost[-1].anchor.sequence}
            self._append(rows, witness, [{"kind": "restored", "time": now(), **gap}])
            self._follow(rows)
        reached = self._witness.reached(witness)
        if reached < self._head.sequence:
            self._witness.extend(witness, [read(line) for line in rows.lines(after=reached)])

    def _follow(self, rows: Rows) -> None:
        """Read and check the records after the newest one known.

        Raises:
            LedgerUnusable: they do not follow it, or the last one is not signed by this site.
        """
        if self._head.sequence:
            line = rows.line(self._head.sequence)
            if line is None or read(line).anchor != self._head:
                raise forked()
        records = [read(line) for line in rows.lines(after=self._head.sequence)]
        for place, fault in faults(CHAIN, records, after=self._head):
            raise LedgerUnusable(f"record {place} of the ledger {fault}; run fedmed ledger verify", rule="ledger.chain")
        if not records:
            return
        if not is_signed(CHAIN, records[-1].anchor, self.keys.public):
            raise LedgerUnusable("the ledger was not signed with this site's key", rule="ledger.signature")
        self._balance.know(known_cohorts(rows.cohorts()) if rows.names() - set(self._balance.cohorts) else [])
        for record in records:
            self._balance.apply(record.anchor.sequence, record.body)
        self._head = records[-1].anchor


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
