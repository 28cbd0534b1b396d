"""The coordinate-wise trimmed mean."""

from __future__ import annotations

import numpy as np

from fedmed.federated.combiners.rows import Matrix
from fedmed.federated.combiners.rule import Rule
from fedmed.types import FloatVector


def trimmed_mean(values: Matrix, dishonest: int) -> FloatVector:
    """The mean of what is left in a coordinate without its f largest and f smallest values.

    Yin et al. 2018, arXiv:1803.01498, definition 2, with β = f/n.
    """
    ordered = np.sort(values, axis=0)
    kept = ordered[dishonest : len(ordered) - dishonest]
    return np.asarray(kept.mean(axis=0, dtype=np.float64), np.float32)


TRIMMED_MEAN = Rule(name="trimmed-mean", least=lambda dishonest: 2 * dishonest + 1, coordinates=trimmed_mean)
