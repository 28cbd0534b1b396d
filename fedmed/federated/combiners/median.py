"""The coordinate-wise median."""

from __future__ import annotations

import numpy as np

from fedmed.federated.combiners.rows import Matrix
from fedmed.federated.combiners.rule import Rule
from fedmed.types import FloatVector


def median(values: Matrix, dishonest: int) -> FloatVector:
    """med{Δ₁,ⱼ, …, Δₙ,ⱼ} for every coordinate j  (Yin et al. 2018, arXiv:1803.01498, definition 1)."""
    ordered = np.sort(values, axis=0)
    upper, lower = ordered[len(ordered) // 2], ordered[(len(ordered) - 1) // 2]
    return np.asarray(lower + (upper - lower) / 2, np.float32)


MEDIAN = Rule(name="median", least=lambda dishonest: 2 * dishonest + 1, coordinates=median)
