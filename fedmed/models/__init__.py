"""Networks: each in one readable file, behind one door, `build`."""

from fedmed.models.attention_unet import gate_maps
from fedmed.models.registry import MODELS, Built, build, build_with_report
from fedmed.models.spatial import margin_of
from fedmed.models.stages import Stage, freeze_, parameter_groups, stages
from fedmed.models.weights import Loaded

__all__ = [
    "MODELS",
    "Built",
    "Loaded",
    "Stage",
    "build",
    "build_with_report",
    "freeze_",
    "gate_maps",
    "margin_of",
    "parameter_groups",
    "stages",
]
