"""From events to ε: numerical composition (PRV) where it can be trusted, Rényi differential privacy (RDP) elsewhere.

Neighbours differ in one patient, added or removed, with everything that is theirs (for the unit "site": one hospital).
An event of the unit "image" is charged to the patient, who may have `images_per_patient` images in the run.

PRV is Opacus' implementation of Gopi et al. 2021 (arXiv:2106.02848). RDP (Mironov 2017, arXiv:1702.07476) is `renyi`,
turned into ε by dp-accounting. Opacus' third accountant, `gdp`, is not offered: it is the limit of many small steps and
no bound. At 57 of 70 settings it reported less than was spent, down to 0.16 of it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError
from fedmed.privacy import opacus_prv
from fedmed.privacy.renyi import ORDERS, step_curve
from fedmed.types import PrivacyEvent

Values = NDArray[np.float64]

PRV_ERROR = 0.0085  # of ε: PRV adds it to its estimate, so that what it says is a bound
LEAST_DELTA = 1e-10  # below, the rounding of the Fourier transform can reach the tail that δ cuts off
MOST_POINTS = 2**22  # of PRV's grid: seconds and 32 MiB an array
MOST_LOSS = 300.0  # nobody asks for such an ε, and its exponential leaves float64
MOST_STEPS = 10**6  # PRV's quadrature errs by up to 1e-8 a step


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What events cost together at one δ: (ε, δ)-differential privacy for the unit's owner."""

    epsilon: float  # the smaller of the two bounds; infinite where a release had no noise
    accountant: Literal["prv", "rdp"]  # whose it is
    epsilon_rdp: float  # by RDP at its best order; of a ledger, by its filter


@dataclass(frozen=True)
class _Composition:
    """Events in a normal form: order does not matter, and equal ones add up."""

    sampled: Counter[tuple[float, float]]  # (σ, q) -> steps, 0 < q < 1
    groups: Counter[tuple[float, float, int]]  # (σ, q, images of a patient) -> steps
    precision: float  # Σ steps / σ² of what was not sampled: such Gaussians compose into one


def spent(events: Sequence[PrivacyEvent], *, delta: float) -> Spent:
    """ε of all events together at δ.

    Args:
        events: charged to the same patients (or hospitals). Nothing released is ε 0.
        delta: δ, in (0, 1).

    Returns:
        PRV's bound, which lies at most 0.015 above dp-accounting's PLD; or RDP's, where PRV does not take the events,
        fails, cannot be trusted at this δ or this many steps, or says more.

    Raises:
        ConfigError: δ or an event is impossible.
    """
    check_delta(delta)
    composition = _composition(events)
    by_rdp = rdp_epsilon(*_curve(composition), delta=delta)
    by_prv = _prv_epsilon(composition, delta, by_rdp)
    if by_prv is None or by_prv >= by_rdp:
        return Spent(epsilon=by_rdp, accountant="rdp", epsilon_rdp=by_rdp)
    return Spent(epsilon=by_prv, accountant="prv", epsilon_rdp=by_rdp)


def rdp_curve(events: Sequence[PrivacyEvent]) -> tuple[Values, Values]:
    """Rényi divergence of all events together at every order, which a filter may add up order by order.

    Such sums stay true where later events depend on earlier results (Feldman and Zrnic 2021, arXiv:2008.11193).

    Returns:
        Orders α > 1, and D_α at each; infinite where it has no bound.

    Raises:
        ConfigError: an event is impossible.
    """
    return _curve(_composition(events))


def rdp_epsilon(orders: Values, divergences: Values, *, delta: float) -> float:
    """ε from a curve of Rényi divergences, by its best order (Canonne et al. 2020, arXiv:2004.00010, proposition 12).

    Raises:
        ConfigError: δ is not in (0, 1).
    """
    from dp_accounting.rdp import compute_epsilon

    check_delta(delta)
    known = np.isfinite(divergences)
    if not known.any():
        return math.inf
    return float(compute_epsilon(orders[known], divergences[known], delta)[0])


def warm_up() -> None:
    """Import what the accountants need, which takes seconds: before processes are forked, so that it is done once."""
    import dp_accounting.rdp  # noqa: F401  # imported for the forks

    opacus_prv.prv()


def check_delta(delta: float) -> None:
    """Refuse a δ that is no probability of failure.

    Raises:
        ConfigError: always then.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta is a probability between 0 and 1, both excluded; got {delta}")


def _composition(events: Sequence[PrivacyEvent]) -> _Composition:
    sampled: Counter[tuple[float, float]] = Counter()
    groups: Counter[tuple[float, float, int]] = Counter()
    precision = 0.0
    for event in events:
        _check(event)
        sigma, rate, images = event.noise_multiplier, event.sample_rate, 1
        if event.unit == "site":
            rate = 1.0  # the server's records show who took part, so sampling hides nobody
        elif event.unit == "image":
            images = event.images_per_patient
        if event.steps == 0 or rate == 0:
            continue
        if sigma == 0 or rate == 1:
            precision += math.inf if sigma == 0 else event.steps * (images / sigma) ** 2
        elif images > 1:
            groups[sigma, rate, images] += event.steps
        else:
            sampled[sigma, rate] += event.steps
    return _Composition(sampled, groups, precision)


def _check(event: PrivacyEvent) -> None:
    if not (math.isfinite(event.noise_multiplier) and event.noise_multiplier >= 0):
        raise ConfigError(f"a noise multiplier is a number from 0 up; got {event.noise_multiplier}")
    if not 0 <= event.sample_rate <= 1:
        raise ConfigError(f"a sample rate is a probability between 0 and 1; got {event.sample_rate}")
    if event.mechanism == "gaussian" and event.sample_rate != 1:
        raise ConfigError("a release without sampling has the sample rate 1; name it sampled-gaussian otherwise")
    if event.steps < 0 or event.images_per_patient < 1:
        raise ConfigError("an event has 0 or more steps, and a patient at least 1 image")


def _curve(composition: _Composition) -> tuple[Values, Values]:
    orders = np.array(ORDERS)
    total = orders / 2 * composition.precision
    for (sigma, rate), steps in composition.sampled.items():
        total = total + steps * step_curve(ORDERS, sigma, rate, images=1)
    for (sigma, rate, images), steps in composition.groups.items():
        total = total + steps * step_curve(ORDERS, sigma, rate, images=images)
    return orders, total


def _prv_epsilon(composition: _Composition, delta: float, bound: float) -> float | None:
    """Opacus' PRVAccountant, taken apart so that its grid is bounded and its result is looked at; None = no trust."""
    history = [(sigma, rate, steps) for (sigma, rate), steps in composition.sampled.items()]
    if composition.precision > 0:
        history.append((composition.precision**-0.5 if math.isfinite(composition.precision) else 0.0, 1.0, 1))
    steps = sum(steps for _, _, steps in history)
    if composition.groups or not history or delta < LEAST_DELTA or steps > MOST_STEPS or not 0 < bound < MOST_LOSS:
        return None

    prv = opacus_prv.prv()
    delta_error = delta / 1000
    variables = [prv.PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in history]
    counts = [steps for _, _, steps in history]
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # of log(1 - q) at q = 1, and of orders at their end
        warnings.simplefilter("ignore")
        try:
            reach = prv.compute_safe_domain_size(
                prvs=variables, max_self_compositions=counts, eps_error=PRV_ERROR, delta_error=delta_error
            )
            mesh = PRV_ERROR / math.sqrt(steps * math.log(12 / delta_error) / 2)
            if not (reach < MOST_LOSS and 2 * reach / mesh < MOST_POINTS):
                return None
            domain = prv.Domain.create_aligned(-reach, reach, mesh)
            cut = [prv.TruncatedPrivacyRandomVariable(each, domain.t_min, domain.t_max) for each in variables]
            whole = prv.compose_heterogeneous(
                dprvs=[prv.discretize(each, domain) for each in cut], num_self_compositions=counts
            )
            low, middle, high = whole.compute_epsilon(delta, delta_error, PRV_ERROR)
        except (ArithmeticError, IndexError, RuntimeError, ValueError):  # how Opacus says that it cannot
            return None
    trusted = math.isfinite(high) and low <= middle <= high
    return float(max(high, 0.0)) if trusted and _tail_is_true(whole.pmf, steps, delta) else None


def _tail_is_true(masses: Values, steps: int, delta: float) -> bool:
    """Whether rounding in the Fourier transforms left the tail that δ measures alone, to half a percent of δ.

    What every value errs by alone shows as masses below zero: a sum over all is off by six of its standard deviations
    at most. What all err by together grows with the power that the transform is raised to. A total other than 1 is an
    error in proportion, which a tail hardly feels.
    """
    negative = masses[masses < 0]
    alone = math.sqrt(float(np.mean(negative**2))) if negative.size else 0.0
    rounding = 6 * alone * math.sqrt(masses.size) + steps * float(np.finfo(np.float64).eps)
    return rounding < delta / 200 and abs(1 - float(masses.sum())) < 1e-5
