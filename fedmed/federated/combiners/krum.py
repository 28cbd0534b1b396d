"""Krum and Multi-Krum: the updates with the closest neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmed.federated.combiners.rule import Rule, Shares

Distances = NDArray[np.float64]  # (n, n), squared


def scores(distances: Distances, dishonest: int) -> NDArray[np.float64]:
    """s(i) = Σ ‖Δᵢ - Δⱼ‖² over the n - f - 2 nearest j ≠ i  (Blanchard et al. 2017, arXiv:1703.02757, section 4)."""
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    neighbours = max(len(distances) - dishonest - 2, 1)
    nearest: NDArray[np.float64] = np.sort(others, axis=1)[:, :neighbours].sum(axis=1)
    return nearest


def krum(distances: Distances, dishonest: int) -> Shares:
    """The one update with the lowest score; of equal ones the first by the site's name."""
    shares = np.zeros(len(distances))
    shares[np.argmin(scores(distances, dishonest))] = 1
    return shares


def multi_krum(distances: Distances, dishonest: int) -> Shares:
    """The mean of the m = n - f updates with the lowest scores  (Blanchard et al. 2017, section 4, "m-Krum")."""
    best = np.argsort(scores(distances, dishonest), kind="stable")[: len(distances) - dishonest]
    shares = np.zeros(len(distances))
    shares[best] = 1
    return shares


def least(dishonest: int) -> int:
    """How many sites it takes, n ≥ 2f + 3: with fewer, f colluding ones could be each other's neighbours and win."""
    return 2 * dishonest + 3


KRUM = Rule(name="krum", least=least, shares=krum)
MULTI_KRUM = Rule(name="multi-krum", least=least, shares=multi_krum)
