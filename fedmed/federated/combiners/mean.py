"""The weighted mean: streamed, with the heaviest sites held back until it is known what they may count for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmed.federated.aggregation import Aggregate, Contribution, WeightedMean
from fedmed.federated.combiners.base import RoundTerms, contribution_of
from fedmed.types import Update, Weights


@dataclass(frozen=True, kw_only=True)
class Held:
    """An update that may turn out too heavy, in copies of its own."""

    contribution: Contribution
    weights: Weights


class Mean:
    """Σ kᵢ·Δᵢ / Σ kᵢ, in which no kᵢ is more than `strategy.max-weight-share` of the sum.

    Weights above that share s are lowered to the largest value at which all keep to it. They are fewer than 1/s sites,
    the heaviest ones; so it is enough to hold back that many of the heaviest so far, and memory stays flat in the
    number of sites. With 1/s sites or fewer, no weights but equal ones can do: then all count as much as the lightest.
    """

    def __init__(self, terms: RoundTerms) -> None:
        """Start from nothing."""
        self._terms = terms
        self._mean = WeightedMean(terms.layout, terms.sent, scaled_sum=terms.step.scaled_sum)
        share = terms.strategy.max_weight_share
        self._room = math.ceil(1 / share) - 1
        self._held: list[Held] = []
        self._contributions: list[Contribution] = []

    def add(self, site: str, update: Update, weights: Weights) -> None:
        """Add an update to the sum, or hold it back if it is among the heaviest."""
        new = contribution_of(self._terms, site, update, weights)
        self._contributions.append(new)
        if len(self._held) >= self._room:
            lightest = min(self._held, key=lambda held: held.contribution.weight, default=None)
            if lightest is None or new.weight <= lightest.contribution.weight:
                return self._pour(new, weights)
            self._held.remove(lightest)
            self._pour(lightest.contribution, lightest.weights)
        copies = Weights(parameters=weights.parameters.copy(), buffers=weights.buffers.copy())
        self._held.append(Held(contribution=new, weights=copies))
        return None

    def too_few(self) -> str | None:
        """A mean can be taken of one."""
        return None

    def result(self) -> Aggregate:
        """The mean with capped weights."""
        limit = weight_limit([each.weight for each in self._contributions], self._terms.strategy.max_weight_share)
        final = tuple(replace(each, weight=min(each.weight, limit)) for each in self._contributions)
        for held in self._held:
            light = replace(held.contribution, weight=min(held.contribution.weight, limit))
            self._pour(light, held.weights)
        facts = {
            "capped": [each.site for each in self._contributions if each.weight > limit],
            "clipped": [each.site for each in final if each.clipped],
        }
        return replace(
            self._mean.result(),
            contributions=final,
            known=self._terms.known,
            facts={name: sites for name, sites in facts.items() if sites},
        )

    def _pour(self, new: Contribution, weights: Weights) -> None:
        step, terms, factor = self._terms.step, self._terms, 0.0
        if step.scaled_sum:
            factor = step.scaled_sum_factor(new, terms.state, round=terms.round, plateau=terms.plateau)
        self._mean.add(weights, new.weight, scale=new.scale, factor=factor)


def weight_limit(weights: Sequence[float], share: float) -> float:
    """The largest t at which min(kᵢ, t) ≤ share · Σ min(kⱼ, t) for all i; the least weight if there is none.

    With m weights at t and the others summing to r, t = share·(m·t + r), so t = share·r / (1 - m·share).
    """
    falling = sorted(weights, reverse=True)
    if share >= 1 or not falling:
        return math.inf
    if len(falling) * share <= 1:
        return falling[-1]
    for lowered, heaviest in enumerate(falling):
        limit = share * sum(falling[lowered:]) / (1 - lowered * share)
        if heaviest <= limit:
            return math.inf if lowered == 0 else limit
    return falling[-1]
