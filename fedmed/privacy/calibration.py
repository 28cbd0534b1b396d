"""From a budget to a plan: the least noise that keeps it, and the most steps that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

from fedmed.errors import ConfigError
from fedmed.privacy.accounting import rdp_curve, rdp_epsilon, spent
from fedmed.types import PrivacyEvent

Bracket = tuple[float, float]

MOST_NOISE = 1e7  # σ; where even this is not enough, the rest of the budget is spent
LEAST_NOISE = 0.01  # less is no noise worth the name, whatever the budget
PRECISION = 2e-4  # relative, of σ


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    further: Sequence[PrivacyEvent] = (),
    unit: Literal["patient", "image", "site"] = "patient",
    images_per_patient: int = 1,
) -> float:
    """The smallest σ, to 0.1 %, with which `steps` and `further` events together stay within (ε, δ), as `spent` says.

    Args:
        epsilon: the budget, above 0.
        delta: δ, in (0, 1).
        sample_rate: q of the Poisson sampling, 1 for everyone.
        steps: at least 1.
        further: what else is charged to the same patients.
        unit: what is sampled and clipped.
        images_per_patient: of the unit "image", in the whole run.

    Raises:
        ConfigError: a number is impossible, or `further` alone spends the budget.
    """
    _check_budget(epsilon)
    if steps < 1:
        raise ConfigError(f"a plan has at least 1 step; got {steps}")

    def events(sigma: float) -> list[PrivacyEvent]:
        planned = PrivacyEvent(
            mechanism="sampled-gaussian",
            noise_multiplier=sigma,
            sample_rate=sample_rate,
            steps=steps,
            unit=unit,
            images_per_patient=images_per_patient,
        )
        return [*further, planned]

    @cache
    def by_rdp(sigma: float) -> float:
        return rdp_epsilon(*rdp_curve(events(sigma)), delta=delta)

    @cache
    def by_best(sigma: float) -> float:
        return spent(events(sigma), delta=delta).epsilon

    if spent(further, delta=delta).epsilon >= epsilon:
        raise ConfigError(f"what is already charged spends the budget ε {epsilon:g}; no noise makes room for more")
    rough = _least(by_rdp, epsilon, _bracket(by_rdp, epsilon, start=1.0, factor=2.0), precision=0.02)
    return _least(by_best, epsilon, _bracket(by_best, epsilon, start=rough, factor=1.2), precision=PRECISION)


def _bracket(epsilon_at: Callable[[float], float], epsilon: float, *, start: float, factor: float) -> Bracket:
    """Two σ, a factor apart, of which the smaller breaks the budget and the larger keeps it."""
    sigma = start
    while epsilon_at(sigma) > epsilon:
        sigma *= factor
        if sigma > MOST_NOISE:
            raise ConfigError(
                f"no noise keeps so many steps within ε {epsilon:g}; ask for fewer steps, a larger ε or a larger δ"
            )
    while sigma > LEAST_NOISE and epsilon_at(sigma / factor) <= epsilon:
        sigma /= factor
    return sigma / factor, sigma


def _least(epsilon_at: Callable[[float], float], epsilon: float, bracket: Bracket, *, precision: float) -> float:
    """The smallest σ of the bracket, to a relative precision, at which the falling ε(σ) keeps the budget."""
    from scipy.optimize import brentq  # heavy: a run without privacy needs none of it

    def excess(log_sigma: float) -> float:
        return math.log(min(max(epsilon_at(math.exp(log_sigma)), 1e-12), 1e12) / epsilon)

    low, high = bracket
    if epsilon_at(low) <= epsilon:
        return low
    root, report = brentq(
        excess, math.log(low), math.log(high), xtol=precision / 2, rtol=1e-12, full_output=True, disp=False
    )
    sigma = math.exp(root) if report.converged else high
    while epsilon_at(sigma) > epsilon:  # the root may lie on either side
        sigma *= 1 + precision / 2
    return float(sigma)


def _check_budget(epsilon: float) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"a budget ε is a number above 0; got {epsilon}")
