"""Per-patient gradient clipping at little more than the cost of a plain step.

One door, `GradientClipper`. Opacus' optimizer for what it makes is in `optimizer`, which takes seconds to import.
"""

from fedmed.training.clipping.engine import Clipped, GradientClipper, layers_of, slow_layers

__all__ = ["Clipped", "GradientClipper", "layers_of", "slow_layers"]
