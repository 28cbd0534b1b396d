"""Networks: each in one readable file, behind one door, `build`."""

from fedmed.models.registry import MODELS, build

__all__ = ["MODELS", "build"]
