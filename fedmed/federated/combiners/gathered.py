"""Rules that must see the updates side by side: they wait on disk until all are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmed.errors import UpdateRefused
from fedmed.federated.aggregation import Aggregate, Contribution
from fedmed.federated.combiners.base import RoundTerms, contribution_of
from fedmed.federated.combiners.mean import weight_limit
from fedmed.federated.combiners.median import median
from fedmed.federated.combiners.rows import Matrix, Rows
from fedmed.federated.combiners.rule import Rule, Shares, too_few
from fedmed.training.moments import second_moments, variances
from fedmed.types import FloatVector, Update, Weights


class Gathered:
    """Combines by a `Rule`, or without one by the shares that the algorithm itself gives (`ServerStep.weighs`)."""

    def __init__(self, terms: RoundTerms, rule: Rule | None) -> None:
        """Start from nothing."""
        self._terms, self._rule = terms, rule
        self._rows = Rows(terms.layout.num_parameters + terms.layout.num_buffers, terms.folder)
        self._contributions: list[Contribution] = []

    def add(self, site: str, update: Update, weights: Weights) -> None:
        """Put an update beside the others."""
        new = contribution_of(self._terms, site, update, weights)
        self._rows.append(weights.parameters, self._terms.sent.parameters, new.scale, weights.buffers)
        self._contributions.append(new)

    def too_few(self) -> str | None:
        """Why the rule is not defined for so few sites, or None."""
        count = len(self._contributions)
        return too_few(self._rule, self._terms.strategy.dishonest_sites, count) if self._rule and count else None

    def result(self) -> Aggregate:
        """What the rule makes of the updates, whatever the order in which they came."""
        problem = self.too_few() if self._contributions else "there is no update to combine"
        if problem:
            raise UpdateRefused(problem)
        order = sorted(range(len(self._contributions)), key=lambda number: self._contributions[number].site)
        given = [self._contributions[number] for number in order]
        shares = self._shares(order, given)
        chosen = [place for place, share in enumerate(shares) if share > 0]
        selected, kept = [order[place] for place in chosen], shares[chosen]
        layout = self._terms.layout
        change = np.empty(layout.num_parameters, np.float32)
        for span, matrix in self._rows.columns(selected, 0, change.size):
            change[span] = self._combined(matrix, kept)
        buffers = self._buffers(order, selected, kept)
        self._rows.close()
        facts = {
            "discarded": [each.site for place, each in enumerate(given) if place not in chosen],
            "clipped": [each.site for each in given if each.clipped],
            "shares": {each.site: float(share) for each, share in zip(given, shares, strict=True)}
            if len(set(kept)) > 1
            else {},
        }
        return Aggregate(
            change=change,
            buffers=buffers,
            contributions=tuple(replace(each, weight=float(share)) for each, share in zip(given, shares, strict=True)),
            known=self._terms.known,
            facts={name: value for name, value in facts.items() if value},
        )

    def _shares(self, order: list[int], given: list[Contribution]) -> Shares:
        if self._rule is None:
            asked = self._terms.step.shares(given, self._terms.state)
            weights = [float(asked[each.site]) for each in given]
            limit = weight_limit([weight for weight in weights if weight > 0], self._terms.strategy.max_weight_share)
            shares = np.minimum(weights, limit)
        elif self._rule.shares is None:
            shares = np.ones(len(order))
        else:
            distances = self._rows.squared_distances(order, self._terms.layout.num_parameters)
            shares = self._rule.shares(distances, self._terms.strategy.dishonest_sites)
        total = shares.sum()
        if not (np.isfinite(total) and total > 0 and (shares >= 0).all()):
            raise UpdateRefused("the algorithm gives no site a positive weight")
        return np.asarray(shares / total)

    def _combined(self, matrix: Matrix, shares: Shares) -> FloatVector:
        if self._rule is not None and self._rule.coordinates is not None:
            return self._rule.coordinates(matrix, self._terms.strategy.dishonest_sites)
        total = np.zeros(matrix.shape[1])
        for row, share in zip(matrix, shares, strict=True):  # in the order of the names, whatever BLAS would do
            total += share * row
        return total.astype(np.float32)

    def _buffers(self, order: Sequence[int], chosen: Sequence[int], shares: Shares) -> FloatVector:
        """Running statistics, of the sites `order`, of which some were `chosen` and have `shares`.

        The algorithm's own shares pool them as the mean does. A rule for single coordinates is applied to them too.
        Where a rule chose or weighed whole updates by their parameters, it said nothing of what else they bring: there
        the median of all sites is taken, of the variances as they are.
        """
        layout, start = self._terms.layout, self._terms.layout.num_parameters
        rows = order if self._rule is not None and self._rule.coordinates is None else chosen
        matrix = np.empty((len(rows), layout.num_buffers), np.float32)
        for span, part in self._rows.columns(rows, start, start + layout.num_buffers):
            matrix[:, span] = part
        if self._rule is None:
            moments = np.stack([second_moments(row, layout) for row in matrix])
            buffers = variances(self._combined(moments, shares), layout)
        else:
            buffers = (self._rule.coordinates or median)(matrix, self._terms.strategy.dishonest_sites)
        for entry in layout.buffers:
            if entry.integer:
                counts = matrix[:, entry.span].max(axis=0) if self._rule is None else np.rint(buffers[entry.span])
                buffers[entry.span] = counts
        return buffers
