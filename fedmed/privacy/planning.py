"""What a budget buys, before anything runs: noise, sampling, and ε after every round."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedmed.errors import ConfigError
from fedmed.privacy.accounting import check_delta, spent
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.types import PrivacyEvent

MEANINGFUL = 10.0  # ε
MOST_ROWS = 20  # rounds whose ε is computed; of more rounds, as many evenly spread
CHEXNET_PARAMETERS = 6_968_206  # of DenseNet-121 with 14 labels


@dataclass(frozen=True, kw_only=True)
class AfterRound:
    """What has been spent when a round is over."""

    round: int
    steps: int
    epsilon: float
    accountant: Literal["prv", "rdp"]
    epsilon_rdp: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule that keeps a budget."""

    unit: Literal["patient", "image", "site"]
    epsilon: float  # the budget; the last of `schedule` is what the plan spends of it
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps_per_round: int
    schedule: tuple[AfterRound, ...]
    warnings: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.schedule[-1].steps


@dataclass(frozen=True, kw_only=True)
class CentralPlan:
    """Noise at the server beside what it must not drown."""

    plan: Plan
    sites: int
    parameters: int
    clip: float

    @property
    def noise_per_value(self) -> float:
        """Standard deviation of the noise on each value of the mean change, σ·C/K."""
        return self.plan.noise_multiplier * self.clip / self.sites

    @property
    def noise_norm(self) -> float:
        """Expected L2 norm of a round's noise, σ·C·√d/K. No change is longer than the clip C."""
        return self.noise_per_value * math.sqrt(self.parameters)

    @property
    def noise_to_clip(self) -> float:
        """How many clips long a round's noise is."""
        return self.noise_norm / self.clip

    @property
    def trains(self) -> bool:
        """Whether the run could get farther by learning than by noise.

        In R rounds the mean change moves the network by R·C at most, if all hospitals agree on one direction all the
        time; the noise moves it by √R·σ·C·√d/K. If the noise goes farther even then, what comes out is noise.
        """
        return self.noise_to_clip < math.sqrt(self.plan.schedule[-1].round)

    @property
    def refusal(self) -> str:
        """Why such a run is refused, and what would do; empty where it may train."""
        if self.trains:
            return ""
        rounds = self.plan.schedule[-1].round
        return (
            f"this cannot train: over {rounds} rounds the noise would move the network by "
            f"{self.noise_to_clip * math.sqrt(rounds):,.0f} clips, and learning by {rounds} at most. It takes "
            f"about {self.sites_needed:,} hospitals, a smaller network, or noise at the "
            "hospitals with the patient as the unit"
        )

    @property
    def sites_needed(self) -> int:
        """The number of hospitals from which the same noise multiplier would not drown the best case."""
        limit = math.sqrt(self.plan.schedule[-1].round)
        return math.floor(self.plan.noise_multiplier * math.sqrt(self.parameters) / limit) + 1


def default_delta(count: int) -> float:
    """min(1e-6, 1/(10·N)) for N patients, or hospitals."""
    return min(1e-6, 1 / (10 * count))


def check_budget(epsilon: float) -> tuple[str, ...]:
    """A warning about a budget beyond the second tier of Ponomareva et al. 2023, "How to DP-fy ML"."""
    if epsilon <= MEANINGFUL:
        return ()
    return (f"ε = {epsilon:g} promises little; more than {MEANINGFUL:g} is hardly ever called private",)


def check_population(delta: float, count: int, what: str = "patients") -> tuple[str, ...]:
    """Warnings about a δ for so many patients.

    Raises:
        ConfigError: δ is at least 1/N: a release that publishes one patient at random would be allowed.
    """
    check_delta(delta)
    if count < 1:
        raise ConfigError(f"a plan needs at least 1 of the {what}; got {count}")
    if delta >= 1 / count:
        raise ConfigError(
            f"delta {delta:g} is at least 1/{count}: it would allow publishing the data of one of the {what} in full. "
            f"Use {default_delta(count):.1g} or less"
        )
    if delta > 1 / (10 * count):
        return (f"delta {delta:g} is above 1/(10 × {count} {what}); {default_delta(count):.1g} is safer",)
    return ()


def plan_training(
    *,
    patients: int,
    epsilon: float,
    rounds: int,
    batch_size: int,
    steps_per_round: int = 0,
    delta: float | None = None,
    unit: Literal["patient", "image"] = "patient",
    images_per_patient: int = 1,
) -> Plan:
    """The least noise for DP-SGD at one site, and what each round spends.

    Args:
        patients: N at the site, public.
        epsilon: the budget.
        rounds: of the federation.
        batch_size: expected number of units in a step; q = batch size / number of units.
        steps_per_round: 0 = as many as make one pass over the data.
        delta: None = `default_delta(patients)`.
        unit: what is sampled and clipped. ε is the patient's in both cases.
        images_per_patient: for the unit "image" the most that one patient has in the run. Everybody counts as having
            so many: how many there are is for nobody to know.

    Raises:
        ConfigError: a number is impossible, or the budget cannot be kept, with the reason.
    """
    delta = default_delta(max(patients, 1)) if delta is None else delta
    warnings = (*check_population(delta, patients), *check_budget(epsilon))
    units = patients if unit == "patient" else patients * images_per_patient
    if rounds < 1 or steps_per_round < 0:
        raise ConfigError("a plan has at least 1 round and 1 step a round")
    if not 1 <= batch_size <= units:
        raise ConfigError(f"a batch of {batch_size} cannot be drawn from {units} {unit}s")
    steps_per_round = steps_per_round or math.ceil(units / batch_size)
    rate = batch_size / units
    sigma = noise_multiplier_for(
        epsilon=epsilon,
        delta=delta,
        sample_rate=rate,
        steps=rounds * steps_per_round,
        unit=unit,
        images_per_patient=images_per_patient,
    )
    event = PrivacyEvent(
        mechanism="sampled-gaussian",
        noise_multiplier=sigma,
        sample_rate=rate,
        unit=unit,
        images_per_patient=images_per_patient,
    )
    return Plan(
        unit=unit,
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=sigma,
        sample_rate=rate,
        steps_per_round=steps_per_round,
        schedule=schedule(event, rounds=rounds, steps_per_round=steps_per_round, delta=delta),
        warnings=warnings,
    )


def plan_central(
    *,
    sites: int,
    epsilon: float,
    rounds: int,
    parameters: int,
    clip: float = 1.0,
    delta: float | None = None,
    noise_multiplier: float = 0.0,
) -> CentralPlan:
    """The least noise for differential privacy at the server, with the hospital as the unit.

    Everyone is charged for every round: the server's records show who took part, so sampling hides nobody.

    Args:
        sites: K, fixed and public.
        epsilon: the budget of a hospital.
        rounds: of the federation.
        parameters: d, trained values of the network.
        clip: C, the largest norm of a hospital's change.
        delta: None = `default_delta(sites)`.
        noise_multiplier: σ, if it is given; 0 = the least that keeps the budget.

    Raises:
        ConfigError: a number is impossible, or the budget cannot be kept, with the reason.
    """
    delta = default_delta(max(sites, 1)) if delta is None else delta
    warnings = (*check_population(delta, sites, "hospitals"), *check_budget(epsilon))
    if rounds < 1 or parameters < 1 or not (math.isfinite(clip) and clip > 0):
        raise ConfigError("a plan has at least 1 round and 1 parameter, and a clip above 0")
    sigma = noise_multiplier or noise_multiplier_for(
        epsilon=epsilon, delta=delta, sample_rate=1.0, steps=rounds, unit="site"
    )
    event = PrivacyEvent(mechanism="gaussian", noise_multiplier=sigma, unit="site", release="update")
    plan = Plan(
        unit="site",
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=sigma,
        sample_rate=1.0,
        steps_per_round=1,
        schedule=schedule(event, rounds=rounds, steps_per_round=1, delta=delta),
        warnings=warnings,
    )
    return CentralPlan(plan=plan, sites=sites, parameters=parameters, clip=clip)


def schedule(event: PrivacyEvent, *, rounds: int, steps_per_round: int, delta: float) -> tuple[AfterRound, ...]:
    """ε after each round, or after `MOST_ROWS` of them that are evenly spread; always after the last."""
    shown = sorted({math.ceil(rounds * row / MOST_ROWS) for row in range(1, MOST_ROWS + 1)})
    rows = []
    for number in shown:
        steps = number * steps_per_round
        cost = spent([replace(event, steps=steps)], delta=delta)
        rows.append(
            AfterRound(
                round=number,
                steps=steps,
                epsilon=cost.epsilon,
                accountant=cost.accountant,
                epsilon_rdp=cost.epsilon_rdp,
            )
        )
    return tuple(rows)
