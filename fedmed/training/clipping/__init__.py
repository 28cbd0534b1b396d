"""Per-patient gradient clipping at little more than the cost of a plain step, behind one door: `GradientClipper`."""

from fedmed.training.clipping.engine import Clipped, GradientClipper

__all__ = ["Clipped", "GradientClipper"]
