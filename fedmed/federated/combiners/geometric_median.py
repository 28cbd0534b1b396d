"""The geometric median: the point whose distances to all updates have the smallest sum."""

from __future__ import annotations

import numpy as np

from fedmed.federated.combiners.krum import Distances
from fedmed.federated.combiners.rule import Rule, Shares

ROUNDS = 1000
SETTLED = 1e-10  # of a share, between two iterations
SMOOTHING = 1e-6  # of the median distance between two updates


def geometric_median(distances: Distances, dishonest: int) -> Shares:
    """argmin_z Σ ‖z - Δᵢ‖₂ by the smoothed Weiszfeld algorithm, as shares αᵢ of z = Σ αᵢ·Δᵢ.

    αᵢ ∝ 1 / max(ν, ‖z - Δᵢ‖), again and again  (Pillutla et al. 2019, arXiv:1912.13445, algorithm 2). z stays a
    convex combination of the updates, so its distances follow from theirs alone and no vector is touched:
    ‖z - Δᵢ‖² = Σ αⱼ·Dᵢⱼ - ½·Σ Σ αⱼ·αₖ·Dⱼₖ, with D the squared distances.
    """
    count = len(distances)
    shares = np.full(count, 1 / count)
    apart = distances[distances > 0]
    if apart.size == 0:
        return shares
    smallest = SMOOTHING * float(np.sqrt(np.median(apart)))
    for _ in range(ROUNDS):
        rows = distances @ shares
        squared = rows - 0.5 * float(shares @ rows)
        weights = 1 / np.maximum(np.sqrt(np.maximum(squared, 0)), smallest)
        before, shares = shares, weights / weights.sum()
        if np.abs(shares - before).max() < SETTLED:
            break
    return shares


GEOMETRIC_MEDIAN = Rule(name="geometric-median", least=lambda dishonest: 2 * dishonest + 1, shares=geometric_median)
