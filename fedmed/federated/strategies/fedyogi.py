"""FedYogi: as FedAdam, but its second moment moves by steps that do not depend on its own size."""

from __future__ import annotations

import numpy as np

from fedmed.config import RunConfig
from fedmed.federated.strategies.adaptive import Adaptive
from fedmed.types import FloatVector


def second_moment(moment: FloatVector, squares: FloatVector, second_momentum: np.float32) -> FloatVector:
    """The next second moment: v ← v - (1 - β₂)·Δ²·sign(v - Δ²)  (Reddi et al. 2021, arXiv:2003.00295, algorithm 2)."""
    step: FloatVector = (1 - second_momentum) * squares * np.sign(moment - squares)
    return moment - step


def fedyogi(config: RunConfig) -> Adaptive:
    """The algorithm with the run's settings."""
    return Adaptive.with_moment(config, second_moment)
