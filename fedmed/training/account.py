"""A private run's account at one site: on what terms it trains, what it reserves before, and what it says afterwards.

Training touches the patients who are trained on, the metrics of the end those who are held out. Where nobody is both,
the run costs a patient the larger of the two; else, or where that cannot be known, their sum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from fedmed.config import RunConfig
from fedmed.errors import DataError
from fedmed.imaging.dataset import Dataset
from fedmed.privacy.accounting import spent
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.privacy.cohort import Cohort
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.noise import NoiseGenerator, noise_generator
from fedmed.privacy.rdp_filter import charged
from fedmed.training.oversight import Permit
from fedmed.training.private import Unit, units_of
from fedmed.training.reserving import charges_of, reserve_round, run_of
from fedmed.training.sampling import NOBODY_TO_TRAIN_ON, Rows
from fedmed.training.terms import CLIP, Terms, terms_for
from fedmed.types import FloatVector, PrivacyEvent, Scalar

ADJACENCY = "add or remove one patient"
HELD_OUT = "held-out"  # in place of a cohort: patients none of whom was trained on


@dataclass(frozen=True, kw_only=True)
class Account:
    """Leave to train one round by DP-SGD."""

    run: str
    delta: float
    terms: Terms
    units: Sequence[Unit]
    source: NoiseGenerator
    ledger: Ledger
    cohort: str  # name of the patients that are trained on
    warning: str = ""  # of the ledger, about the site's δ

    def facts(self) -> dict[str, Scalar]:
        """What the site says of its patients' budget after the round.

        It follows from public terms, but for one thing: who is known under several ids is counted as so many.
        """
        trained, judged = map(self._as_charged, (self._trained(), self._judged()))
        apart = bool(judged) and self.ledger.apart({each.cohort for each in judged}, {each.cohort for each in trained})
        sides = [trained, judged] if apart else [[*trained, *judged]]
        own = max((spent(side, delta=self.delta) for side in sides), key=lambda cost: cost.epsilon)
        total = self.ledger.spent(delta=self.delta)
        values: dict[str, object] = {
            "unit": self.terms.unit,
            "adjacency": ADJACENCY,
            "delta": self.delta,
            "images_per_patient": self.terms.images_per_patient,
            "accountant": own.accountant,
            "events": [
                *(asdict(replace(event, cohort="")) for event in trained),
                *(asdict(replace(event, cohort=HELD_OUT if apart else "")) for event in judged),
            ],
            "epsilon": _shown(own.epsilon) if self.source.secret else None,
            "epsilon_total": _shown(total.epsilon) if self.source.secret else None,
            "accountant_total": total.accountant,
        }
        if self.warning:
            values["warning"] = self.warning
        if not self.source.secret:
            values["void"] = 'privacy.noise = "insecure-test": this noise can be predicted and protects nobody'
        return {"privacy": json.dumps(values)}

    def _as_charged(self, events: Sequence[PrivacyEvent]) -> list[PrivacyEvent]:
        """As the ledger charges them to whoever is in their cohort under most ids."""
        often = {name: self.ledger.most_often(name) for name in {event.cohort for event in events}}
        return [
            event
            if often[event.cohort] == 1
            else replace(
                charged(event, often[event.cohort]), steps=event.steps, release=event.release, cohort=event.cohort
            )
            for event in events
        ]

    def _trained(self) -> list[PrivacyEvent]:
        """Of this run, what was trained so far: as many rounds as left a mark, those trained again counted again.

        If the site's patients changed in the midst of the run, what was reserved for others than now counts in full.
        """
        charges = charges_of(self.ledger, self.run)
        rounds = sum(not charge.events and charge.cohort == self.cohort for charge in charges.values())
        own = self.terms.event(steps=rounds * self.terms.steps, cohort=self.cohort)
        others = [event for event in self._reserved("gradients") if not _of(event, self.terms, self.cohort)]
        return [*others, own] if own.steps else others

    def _judged(self) -> list[PrivacyEvent]:
        """Of this run, what was reserved for metrics of held-out patients."""
        return self._reserved("metrics")

    def _reserved(self, release: str) -> list[PrivacyEvent]:
        events = [event for charge in charges_of(self.ledger, self.run).values() for event in charge.events]
        return [event for event in events if event.release == release]


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
        DataError: there is nobody to train on.
    """
    privacy, train = config.privacy, config.train
    units = units_of(data, rows, privacy)
    patients, _ = data.people(named=True)
    count = patients * (1 if privacy.unit == "patient" else privacy.images_per_patient)  # of none it is 0
    if kept is not None and not count:
        raise DataError.told(NOBODY_TO_TRAIN_ON)
    public = terms_for(privacy, train, units=max(count, 1), noise_multiplier=1.0)
    run = run_of(config.name, settings)
    sigma = (
        privacy.noise_multiplier
        or _planned_noise(permit.ledger, run, public, cohort.name)
        or (kept is None and 1.0)  # unused: no round is trained
        or noise_multiplier_for(
            epsilon=permit.allowance.epsilon,
            delta=permit.allowance.delta,
            sample_rate=public.sample_rate,
            steps=train.rounds * public.steps,
            unit=privacy.unit,
            images_per_patient=privacy.images_per_patient,
        )
    )
    terms = replace(public, noise_multiplier=max(sigma, permit.allowance.min_noise_multiplier))
    releases = [terms.event(steps=terms.steps)]
    mark = None if kept is None else reserve_round(permit.ledger, run, round, releases, cohort, rounds=train.rounds)
    if kept and CLIP in kept:
        terms = replace(terms, max_grad_norm=float(kept[CLIP][0]))
    return Account(
        run=run,
        delta=permit.allowance.delta,
        terms=terms,
        units=units,
        source=noise_generator(privacy.noise, seed=seed),
        ledger=permit.ledger,
        cohort=cohort.name,
        warning=mark.warning if mark else "",
    )


def _shown(epsilon: float) -> float | None:
    """An ε as JSON takes it; None where nothing bounds it."""
    return epsilon if math.isfinite(epsilon) else None


def _planned_noise(ledger: Ledger, run: str, public: Terms, cohort: str) -> float:
    """σ of the schedule that this run has reserved for these patients, whichever process did so; 0 if there is none."""
    planned = (event for charge in charges_of(ledger, run).values() for event in charge.events)
    return next(
        (
            each.noise_multiplier
            for each in planned
            if _of(each, replace(public, noise_multiplier=each.noise_multiplier), cohort)
        ),
        0.0,
    )


def _of(event: PrivacyEvent, terms: Terms, cohort: str) -> bool:
    """Whether an event is of these terms and patients, whatever its steps."""
    return event == terms.event(steps=event.steps, cohort=cohort)
