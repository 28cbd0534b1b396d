"""What a site offers a run whose plan does not fit: fewer steps, or more noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmed.privacy.rdp_filter import Filter, curve_of
from fedmed.types import PrivacyEvent

MOST_NOISE = 64.0  # times what was asked: beyond that nothing is learnt
Fits = Callable[[Sequence[PrivacyEvent]], bool]
PRECISION = 1.02  # of the noise that is offered


def offer(
    events: Sequence[PrivacyEvent], totals: NDArray[np.float64], times: NDArray[np.int64], gate: Filter
) -> str:
    """The largest plans that fit, in words.

    Args:
        events: the plan.
        totals: (kinds, orders) what the persons that it touches have spent.
        times: (kinds,) how often each is in the cohort.
        gate: the budget.
    """

    def fits(plan: Sequence[PrivacyEvent]) -> bool:
        asked = {often: curve_of(plan, times=often) for often in set(times.tolist())}
        return all(
            gate.allows(total + asked[often]) for total, often in zip(totals, times.tolist(), strict=True)
        )

    wanted = sum(event.steps for event in events)
    steps = most_steps(events, fits)
    fewer = f"{steps} of its {wanted} steps fit" if steps else "not one step of it fits"
    noise = least_noise(events, fits)
    return f"{fewer}; all of them fit with a noise multiplier of {noise:.3g}" if noise else fewer


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
