"""The names that public checkpoints give their tensors, told apart and made into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# torchvision until 2018, and whoever trained with it then: `norm.1` of a dense layer is today's `norm1`.
OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.)(norm|relu|conv)\.([12])\.")
HEADS = ("classifier.weight", "fc.weight", "classifier.6.weight")  # of DenseNet, ResNet and VGG
IMAGENET_CLASSES = 1000
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training programs keep the tensors in a checkpoint


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """The tensors of a file under our names."""

    layout: str  # own | torchvision | torchxrayvision | chexnet
    state: Mapping[str, Tensor]
    dropped: tuple[str, ...]  # entries that are no weights, by their name in the file


def renamed(state: Mapping[str, Tensor]) -> Renamed:
    """Returns the tensors of a checkpoint under the names of this package's networks.

    * own: fedmed's own files, and others with torchvision's names.
    * torchvision: its ImageNet networks, which have our names and 1000 classes; and DenseNet-121 files with the names
      from before 2018.
    * torchxrayvision: its networks, known by their thresholds `op_threshs`.
    * chexnet: the public re-implementation's `module.densenet121.…`, with a classifier that ends in a sigmoid.

    `module.` and `model.`, which wrappers put before every name, are taken off whatever the layout.
    """
    layout = "own"
    dropped = tuple(name for name in state if name.split(".")[-1] == "op_threshs")
    names = {name: name for name in state if name not in dropped}
    if dropped:
        layout = "torchxrayvision"
    names = _without(names, "module.")
    if all(name.startswith("densenet121.") for name in names.values()) and names:
        layout, names = "chexnet", _without(names, "densenet121.")
    names = _without(names, "model.")
    if layout == "chexnet":
        names = {old: re.sub(r"^classifier\.0\.", "classifier.", new) for old, new in names.items()}
    modern = {old: OLD_DENSE_LAYER.sub(r"\1\2\3.", new) for old, new in names.items()}
    found = {new: state[old] for old, new in modern.items()}
    classes = {len(found[head]) for head in HEADS if head in found and found[head].dim()}
    if layout == "own" and (modern != names or classes == {IMAGENET_CLASSES}):
        layout = "torchvision"
    return Renamed(layout=layout, state=found, dropped=dropped)


def _without(names: dict[str, str], prefix: str) -> dict[str, str]:
    """Returns names without a prefix that all of them have; else as they are."""
    if not all(name.startswith(prefix) for name in names.values()):
        return names
    return {old: new.removeprefix(prefix) for old, new in names.items()}
