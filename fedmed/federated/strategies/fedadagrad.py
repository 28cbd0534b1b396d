"""FedAdagrad: the server's optimizer is Adagrad."""

from __future__ import annotations

import numpy as np

from fedmed.config import RunConfig
from fedmed.federated.strategies.adaptive import Adaptive
from fedmed.types import FloatVector


def second_moment(moment: FloatVector, squares: FloatVector, second_momentum: np.float32) -> FloatVector:
    """The next second moment: v ← v + Δ²  (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

    The paper's experiments set β₁ = 0 with it.
    """
    return moment + squares


def fedadagrad(config: RunConfig) -> Adaptive:
    """The algorithm with the run's settings."""
    return Adaptive.with_moment(config, second_moment)
