"""Networks: each in one readable file, behind one door, the `registry`.

* Classifiers: `chexnet`, `resnet50`, `vgg16` and `small_cnn`; `cnn_lstm` of slices; `fusion` of modalities.
* Segmentation: `unet`, `attention_unet` and `deepmedic`.
* What they share: `spatial` for images and volumes, `norms`, and the `stages` that fine-tuning knows.
* From elsewhere: `foreign` networks; `weights` by name, with `layouts` of public files and the `input_range` of their
  images; `conversion` to GroupNorm; `low_rank` corrections of a frozen trunk.
"""

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
