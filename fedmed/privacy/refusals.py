"""Why a ledger refuses a plan, and what it offers instead: fewer steps, or more noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log10

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import BudgetExhausted, PolicyRefused
from fedmed.privacy.accounting import spent
from fedmed.privacy.policy import PrivacyRules
from fedmed.privacy.rdp_filter import Filter, charged, curve_of
from fedmed.types import PrivacyEvent, rounded_up

MOST_NOISE = 64.0  # times what was asked: beyond that nothing is learnt
Fits = Callable[[Sequence[PrivacyEvent]], bool]
PRECISION = 1.02  # of the noise that is offered


def check_plan(events: Sequence[PrivacyEvent], patients: int, delta: float, privacy: PrivacyRules) -> str:
    """Refuse what no budget allows; return a warning or "".

    Raises:
        PolicyRefused: an event is impossible or has too little noise, or δ is no protection for so few patients.
    """
    for event in events:
        if not (event.noise_multiplier > 0 and 0 < event.sample_rate <= 1 and event.steps >= 1):
            raise PolicyRefused("a release needs noise, a rate in (0, 1] and a step", rule="ledger.event")
        if event.noise_multiplier < privacy.min_noise_multiplier:
            rule = "policy.privacy.min-noise-multiplier"
            text = f"noise multiplier {event.noise_multiplier:g}; this site asks for {privacy.min_noise_multiplier:g}"
            raise PolicyRefused(f"{text} or more ({rule})", rule=rule)
    if patients * delta >= 1:
        rule = "policy.privacy.delta"
        text = f"δ = {delta:g} is no protection among {patients} patients: it must be below 1/N ({rule})"
        raise PolicyRefused(text, rule=rule, public=f"the site's δ is too large for its patients ({rule})")
    return delta_warning(delta, patients)


def delta_warning(delta: float, patients: int) -> str:
    """What a site should know of a δ that is allowed for so many patients; "" if it is small enough."""
    return f"δ = {delta:g} is above 1/(10·{patients} patients)" if patients * delta * 10 > 1 else ""


def over_budget(
    what: str,
    events: Sequence[PrivacyEvent],
    totals: NDArray[np.float64],
    times: NDArray[np.int64],
    gate: Filter,
    *,
    pinned: bool,
) -> BudgetExhausted | None:
    """Why a plan does not fit into somebody's budget, or None.

    A first plan, for persons who have spent nothing, may also be judged as the fixed schedule that it is, by PRV. That
    is sound because nothing follows it: it stays charged in full, and so the filter's sums stay above the budget.

    Args:
        what: the round and the run, in words.
        events: the plan.
        totals: (kinds, orders) what the persons that it touches have spent.
        times: (kinds,) how often each is in the cohort.
        gate: the budget.
        pinned: whether the cap is the run's first one and the policy now says more.
    """
    if not events or passes(events, totals, times, gate):  # nothing is what the mark of a round asks for
        return None
    if not totals.any():
        most = max(times.tolist())
        whole = [replace(charged(event, most), steps=event.steps) for event in events]
        if spent(whole, delta=gate.delta).epsilon <= gate.epsilon:
            return None
    epsilon = max(gate.epsilon_of(curve) for curve in _after(events, totals, times))
    rule = "policy.privacy.epsilon"
    named = f"{rule} as it was when the run began" if pinned else rule
    found = offer(events, totals, times, gate)
    text = f"{what} would raise ε to {rounded_up(epsilon, 2)} at δ = {gate.delta:g}"
    text = f"{text}; this site allows {gate.epsilon:.2f} ({named})"
    public = f"{what} would exceed the budget of this site's patients ({named})"
    return BudgetExhausted(f"{text}. {found}", rule=rule, public=f"{public}. {found.rounded()}")


def passes(events: Sequence[PrivacyEvent], totals: NDArray[np.float64], times: NDArray[np.int64], gate: Filter) -> bool:
    """Whether the filter allows a plan to everybody whom it touches; arguments as for `over_budget`."""
    return all(gate.allows(curve) for curve in _after(events, totals, times))


def _after(
    events: Sequence[PrivacyEvent], totals: NDArray[np.float64], times: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """What everybody will have spent with a plan."""
    asked = {often: curve_of(events, times=often) for often in set(times.tolist())}
    return [total + asked[often] for total, often in zip(totals, times.tolist(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The largest plans that fit in place of one that does not. They tell what the patients have spent."""

    steps: int  # of those that were asked for, with the noise as it was
    wanted: int
    noise: float | None  # with which all of them fit; None = no noise that is looked for is enough

    def __str__(self) -> str:
        """Return it in words."""
        fewer = f"{self.steps} of its {self.wanted} steps fit" if self.steps else "not one step of it fits"
        return f"{fewer}; all of them fit with a noise multiplier of {self.noise:.3g}" if self.noise else fewer

    def rounded(self) -> Offer:
        """As it leaves the site: two figures, which fit as well."""
        unit = 10 ** max(len(str(self.steps)) - 2, 0)
        return replace(self, steps=self.steps // unit * unit, noise=self.noise and _rounded_up(self.noise))


def _rounded_up(value: float) -> float:
    """To two figures."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return ceil(value / unit) * unit


def offer(events: Sequence[PrivacyEvent], totals: NDArray[np.float64], times: NDArray[np.int64], gate: Filter) -> Offer:
    """The largest plans that fit.

    Args:
        events: the plan.
        totals: (kinds, orders) what the persons that it touches have spent.
        times: (kinds,) how often each is in the cohort.
        gate: the budget.
    """

    def fits(plan: Sequence[PrivacyEvent]) -> bool:
        return passes(plan, totals, times, gate)

    wanted = sum(event.steps for event in events)
    return Offer(steps=most_steps(events, fits), wanted=wanted, noise=least_noise(events, fits))


def most_steps(events: Sequence[PrivacyEvent], fits: Fits) -> int:
    """The longest beginning of a plan that fits, in steps."""
    low, high = 0, sum(event.steps for event in events)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(beginning(events, middle)) else (low, middle - 1)
    return low


def least_noise(events: Sequence[PrivacyEvent], fits: Fits) -> float | None:
    """The smallest noise multiplier, to 2 %, with which all steps fit; None if none does or they have several."""
    asked = {event.noise_multiplier for event in events}
    if len(asked) != 1:
        return None
    low = asked.pop()
    high = low * MOST_NOISE

    def louder(noise: float) -> list[PrivacyEvent]:
        return [replace(event, noise_multiplier=noise) for event in events]

    if not fits(louder(high)):
        return None
    while high / low > PRECISION:
        middle = float(f"{(low * high) ** 0.5:.3g}")
        if not low < middle < high:
            break
        low, high = (low, middle) if fits(louder(middle)) else (middle, high)
    return high


def beginning(events: Sequence[PrivacyEvent], steps: int) -> list[PrivacyEvent]:
    """The first steps of a plan."""
    found = []
    for event in events:
        if steps <= 0:
            break
        found.append(replace(event, steps=min(event.steps, steps)))
        steps -= event.steps
    return found
