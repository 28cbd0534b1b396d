"""Bulyan: Krum selects, and what it selected is trimmed in every coordinate."""

from __future__ import annotations

import numpy as np

from fedmed.federated.combiners.krum import Distances, scores
from fedmed.federated.combiners.rows import Matrix
from fedmed.federated.combiners.rule import Rule, Shares
from fedmed.types import FloatVector


def selection(distances: Distances, dishonest: int) -> Shares:
    """θ = n - 2f updates: Krum's choice, then Krum's choice among the others, and so on.

    El Mhamdi et al. 2018, arXiv:1802.07927, section 4, step 1. Towards the end fewer than f + 3 are left to choose
    from; then the score is the distance to the one nearest neighbour.
    """
    left, shares = list(range(len(distances))), np.zeros(len(distances))
    for _ in range(len(distances) - 2 * dishonest):
        best = left[int(np.argmin(scores(distances[np.ix_(left, left)], dishonest)))]
        left.remove(best)
        shares[best] = 1
    return shares


def around_the_median(values: Matrix, dishonest: int) -> FloatVector:
    """In every coordinate the mean of the β = θ - 2f values closest to the median  (section 4, step 2)."""
    ordered = np.sort(values, axis=0).astype(np.float64)
    middle = np.median(ordered, axis=0)
    closest = np.argsort(np.abs(ordered - middle), axis=0, kind="stable")[: len(values) - 2 * dishonest]
    return np.asarray(np.take_along_axis(ordered, closest, axis=0).mean(axis=0), np.float32)


BULYAN = Rule(name="bulyan", least=lambda dishonest: 4 * dishonest + 3, shares=selection, coordinates=around_the_median)
