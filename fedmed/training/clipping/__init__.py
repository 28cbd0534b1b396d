"""Per-patient gradient clipping at little more than the cost of a plain step.

One door, `GradientClipper`; `ClippedSumOptimizer` is Opacus' optimizer for what it makes.
"""

from fedmed.training.clipping.engine import Clipped, GradientClipper, layers_of, slow_layers
from fedmed.training.clipping.optimizer import ClippedSumOptimizer

__all__ = ["Clipped", "ClippedSumOptimizer", "GradientClipper", "layers_of", "slow_layers"]
