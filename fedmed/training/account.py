"""A private run's account at one site: on what terms it trains, what it reserves before, and what it says afterwards.

The whole schedule of a run is decided before its first round, so it is reserved at once and may be composed
numerically. Every round then leaves a mark in the ledger, a reservation of nothing. A round that is trained again,
because a process was killed or an answer was lost, draws new noise and uses up steps again; when the schedule is used
up, every further round is charged by itself, and the ledger may refuse it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from fedmed.config import RunConfig
from fedmed.imaging.dataset import Dataset
from fedmed.privacy.accounting import spent
from fedmed.privacy.balance import Charge
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.privacy.cohort import Cohort
from fedmed.privacy.ledger import Ledger, Reservation
from fedmed.privacy.noise import NoiseGenerator, noise_generator
from fedmed.training.oversight import Permit
from fedmed.training.private import Unit, units_of
from fedmed.training.sampling import Rows
from fedmed.training.terms import CLIP, Terms, terms_for
from fedmed.types import FloatVector, PrivacyEvent, Scalar

ADJACENCY = "add or remove one patient"
SCHEDULE = 0  # the round under which steps are reserved


@dataclass(frozen=True, kw_only=True)
class Account:
    """Leave to train one round by DP-SGD."""

    run: str
    round: int
    delta: float
    terms: Terms
    units: Sequence[Unit]
    source: NoiseGenerator
    ledger: Ledger
    cohort: str  # name of the patients that are trained on
    warning: str = ""  # of the ledger, about the site's δ

    def facts(self) -> dict[str, Scalar]:
        """What the site says of its patients' budget after the round; all of it follows from public terms."""
        events = self._released()
        own = spent(events, delta=self.delta)
        total = self.ledger.spent()
        values: dict[str, object] = {
            "unit": self.terms.unit,
            "adjacency": ADJACENCY if self.terms.unit == "patient" else "add or remove one image",
            "delta": self.delta,
            "images_per_patient": self.terms.images_per_patient,
            "accountant": own.accountant,
            "events": [asdict(replace(event, cohort="")) for event in events],
            "epsilon": _shown(own.epsilon) if self.source.secret else None,
            "epsilon_total": _shown(total.epsilon) if self.source.secret else None,
        }
        if self.warning:
            values["warning"] = self.warning
        if not self.source.secret:
            values["void"] = 'privacy.noise = "insecure-test": this noise can be predicted and protects nobody'
        return {"privacy": json.dumps(values)}

    def _released(self) -> list[PrivacyEvent]:
        """Of this run, what was trained so far: as many rounds as left a mark, those trained again counted again.

        If the site's patients changed in the midst of the run, what was reserved for others than now counts in full.
        """
        charges = _charges(self.ledger, self.run)
        rounds = sum(not charge.events and charge.cohort == self.cohort for charge in charges.values())
        own = self.terms.event(steps=rounds * self.terms.steps)
        others = [
            event for charge in charges.values() for event in charge.events if not _of(event, self.terms, self.cohort)
        ]
        released = [*others, own] if own.steps else others
        if self.terms.unit == "patient":
            return released
        return [replace(event, unit="patient", images_per_patient=1) for event in released]


def opened_account(
    config: RunConfig,
    settings: str,
    round: int,
    permit: Permit,
    data: Dataset,
    rows: Rows,
    cohort: Cohort,
    *,
    seed: int,
    kept: Mapping[str, FloatVector] | None,
) -> Account:
    """Reserve what a round will spend, before a gradient is computed; or only say what the run has spent so far.

    Args:
        config: the run.
        settings: of the task, as text; with the run's name they say which run this is.
        round: to be trained, or evaluated.
        permit: of the site's policy.
        data: of the site.
        rows: of its training patients.
        cohort: the same patients, as the ledger knows them.
        seed: of noise that is for tests alone.
        kept: of earlier rounds, at the site; the bound that adaptive clipping came to is among it. None = nothing is
            to be trained, and nothing is reserved.

    Raises:
        BudgetExhausted: some patient would exceed the budget.
        PolicyRefused: the noise that the run asks for is not allowed here, or its δ protects nobody.
        LedgerUnusable: the ledger cannot be used.
    """
    privacy, train = config.privacy, config.train
    units = units_of(data, rows, privacy)
    public = terms_for(privacy, train, units=len(units), noise_multiplier=1.0)
    run = f"{config.name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    sigma = (
        privacy.noise_multiplier
        or _planned_noise(permit.ledger, run, public, cohort.name)
        or (kept is None and 1.0)  # of nothing
        or noise_multiplier_for(
            epsilon=permit.terms.epsilon,
            delta=permit.terms.delta,
            sample_rate=public.sample_rate,
            steps=train.rounds * public.steps,
        )
    )
    terms = replace(public, noise_multiplier=max(sigma, permit.terms.min_noise_multiplier))
    mark = None if kept is None else _reserve(permit.ledger, run, round, terms, cohort, rounds=train.rounds)
    if kept and CLIP in kept:
        terms = replace(terms, max_grad_norm=float(kept[CLIP][0]))
    return Account(
        run=run,
        round=round,
        delta=permit.terms.delta,
        terms=terms,
        units=units,
        source=noise_generator(privacy.noise, seed=seed),
        ledger=permit.ledger,
        cohort=cohort.name,
        warning=mark.warning if mark else "",
    )


def _reserve(ledger: Ledger, run: str, round: int, terms: Terms, cohort: Cohort, *, rounds: int) -> Reservation:
    """Charge the whole schedule before the first round, mark every round, and charge what goes beyond the schedule.

    A mark is written before the steps are counted, so that two processes can never share the last steps of a plan.
    Patients who change in the midst of a run, or other terms, have a schedule of their own.

    Returns:
        The round's mark.
    """
    if not _planned(ledger, run, terms, cohort.name):
        left = rounds - round + 1  # a site may join late, or come back with other patients
        ledger.reserve(run, SCHEDULE, [terms.event(steps=left * terms.steps)], cohort)
    mark = ledger.reserve(run, round, [], cohort)
    planned = _planned(ledger, run, terms, cohort.name)
    used = terms.steps * sum(
        not charge.events and charge.cohort == cohort.name and number <= mark.sequence
        for number, charge in _charges(ledger, run).items()
    )
    if used > planned:
        ledger.reserve(run, SCHEDULE, [terms.event(steps=used - planned)], cohort)
    return mark


def _shown(epsilon: float) -> float | None:
    """An ε as JSON takes it; None where nothing bounds it."""
    return epsilon if math.isfinite(epsilon) else None


def _planned_noise(ledger: Ledger, run: str, public: Terms, cohort: str) -> float:
    """σ of the schedule that this run has reserved for these patients, whichever process did so; 0 if there is none."""
    planned = (event for charge in _charges(ledger, run).values() for event in charge.events)
    return next(
        (
            each.noise_multiplier
            for each in planned
            if _of(each, replace(public, noise_multiplier=each.noise_multiplier), cohort)
        ),
        0.0,
    )


def _planned(ledger: Ledger, run: str, terms: Terms, cohort: str) -> int:
    """How many steps this run has reserved on these terms for these patients."""
    events = (event for charge in _charges(ledger, run).values() for event in charge.events)
    return sum(event.steps for event in events if _of(event, terms, cohort))


def _of(event: PrivacyEvent, terms: Terms, cohort: str) -> bool:
    """Whether an event is of these terms and patients, whatever its steps."""
    return event == terms.event(steps=event.steps, cohort=cohort)


def _charges(ledger: Ledger, run: str) -> dict[int, Charge]:
    return {number: charge for number, charge in ledger.charges.items() if charge.run == run}
