"""The gate of the ledger: may a release be added to what a person has spent, whatever the earlier releases showed?

Later noise, rates and lengths are chosen by people who have seen earlier outputs. An ordinary accountant composes plans
that were fixed beforehand; a *filter* composes what was decided on the way (Feldman & Zrnic 2021, arXiv:2008.11193,
Theorem 3.1): at an order α fixed in advance, releases go on for as long as Σ ρᵢ(α) ≤ B(α), and all that was released is
(α, B)-RDP. B(α) is the largest that gives (ε, δ) (Canonne, Kamath & Steinke 2020, arXiv:2004.00010, Proposition 12):

    B(α) = ε − log((α − 1)/α) + (log δ + log α)/(α − 1).

No single order fits all plans, so two are fixed when a ledger is opened, each with half of δ, and a release passes if
one of them allows it. That is sound: stop a copy of the process at each order's own bound. Wherever the real process
ends, it has been within the bound of some order all along (sums only grow), where it and that order's copy are the
same. Hence its δ(ε), a mean over paths of what is never negative, is at most the sum of the two copies', δ in all.
Against the best order chosen afterwards, which no filter may do, this costs some 5 to 20 % of the steps of usual plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmed.privacy.accounting import rdp_curve
from fedmed.privacy.renyi import ORDERS
from fedmed.types import PrivacyEvent

Curve = NDArray[np.float64]  # (orders,) RDP at each order of the accountant
SHARES = (0.5, 0.8)  # the two orders, as shares of the best one for Gaussian noise; sampling favours low ones
USUAL = 8.0  # ε; orders for a larger one, or for none, would make the least spending look like tens


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A budget (ε, δ) of a person, at orders that were fixed before anything was spent."""

    epsilon: float
    delta: float
    orders: tuple[float, ...]

    def allows(self, curve: Curve) -> bool:
        """Whether a person who has spent this is within the budget."""
        return self.epsilon_of(curve) <= self.epsilon

    def epsilon_of(self, curve: Curve) -> float:
        """The smallest budget that would allow this spending; 0 = nothing was spent."""
        if not curve.any():
            return 0.0
        return float(max(0.0, (curve[list(_places(self.orders))] + self._overhead).min()))

    @property
    def _overhead(self) -> Curve:
        order: Curve = np.array(self.orders)
        delta = self.delta / len(self.orders)
        overhead: Curve = np.log((order - 1) / order) - (math.log(delta) + np.log(order)) / (order - 1)
        return overhead


def orders_for(epsilon: float, delta: float) -> tuple[float, ...]:
    """The orders of a new ledger: around the one at which Gaussian releases of that (ε, δ), or (8, δ), are cheapest.

    With ρ(α) = α·r, ε = r + 2√(r·log(1/δ)) at α = 1 + √(log(1/δ)/r).
    """
    log = math.log(1 / delta)
    best = 1 + math.sqrt(log) / (math.sqrt(log + min(epsilon, USUAL)) - math.sqrt(log))
    return tuple(sorted({ORDERS[int(np.abs(np.array(ORDERS) - share * best).argmin())] for share in SHARES}))


def curve_of(events: Sequence[PrivacyEvent], *, times: int = 1) -> Curve:
    """(orders,) what events cost a person who takes part in each of them `times` times, under so many ids.

    Raises:
        FedmedError: the accountant does not take an event.
    """
    total = np.zeros(len(ORDERS))
    for event in events:
        if event.steps:
            total = total + event.steps * _step(charged(event, times))
    return total


def charged(event: PrivacyEvent, times: int) -> PrivacyEvent:
    """One step of an event as it is charged to a person with so many ids: by group privacy, as for several images.

    An event of the unit "site" speaks of a hospital that comes or goes. A patient who does leaves another change of the
    hospital in place of the first, each as long as the clip at most: a distance of two clips, which counts as two.
    """
    event = replace(event, steps=1, cohort="", release="gradients")
    if times == 1 and event.unit != "site":
        return event
    images = {"patient": 1, "image": event.images_per_patient, "site": 2}[event.unit]
    rate = 1.0 if event.unit == "site" else event.sample_rate  # the server's records show which hospital took part
    return replace(event, unit="image", images_per_patient=images * times, sample_rate=rate)


@lru_cache(maxsize=1024)
def _step(event: PrivacyEvent) -> Curve:
    return np.array(rdp_curve([event])[1], np.float64)


@lru_cache(maxsize=64)
def _places(orders: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(int(np.abs(np.array(ORDERS) - order).argmin()) for order in orders)
