"""Images of public networks have a range of their own, and fedmed's lie in [0, 1]: the first layer takes in the map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = {"features.conv0": "features.norm0", "conv1": "bn1", "features.0": ""}  # and the BatchNorm behind it


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """What a network was trained on: (x − mean) / std of every channel of images x in [0, 1]."""

    name: str
    mean: tuple[float, ...]  # of each channel, or of all
    std: tuple[float, ...]


IMAGENET = InputRange(  # of torchvision's weights, and of whatever was fine-tuned from them
    name="images standardised as ImageNet's", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
XRAYVISION = InputRange(name="images in [-1024, 1024]", mean=(0.5,), std=(1 / 2048,))
OF_LAYOUT = {"torchvision": IMAGENET, "chexnet": IMAGENET, "torchxrayvision": XRAYVISION}


@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """The tensors of a file, for images in [0, 1]."""

    state: Mapping[str, Tensor]
    changed: tuple[str, ...] = ()
    source: str = ""  # the range that they were for; empty where nothing changed


def for_unit_range(layout: str, state: Mapping[str, Tensor]) -> Rescaled:
    """Returns tensors that do to x in [0, 1] what those of a public layout do to images of their own range.

    w · (x − m) / s = (w / s) · x − Σ w m / s: the first convolution's weights are divided by s, and the constant goes
    into its bias or, where it has none, into the mean of the BatchNorm behind it. Both are equal but for pixels at the
    border, since the zeros that convolutions put around an image are black now, and were m before.

    Args:
        layout: As `layouts.renamed` says; others than the public ones stay as they are.
        state: By the names of this package's networks.
    """
    first = next((name for name in FIRST if f"{name}.weight" in state), "")
    where = f"{first}.bias" if f"{first}.bias" in state else f"{FIRST.get(first)}.running_mean"
    if layout not in OF_LAYOUT or where not in state:
        return Rescaled(state=state)
    given, weight = OF_LAYOUT[layout], state[f"{first}.weight"]
    if weight.dim() != 4 or len(given.mean) not in (1, weight.shape[1]):
        return Rescaled(state=state)
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (given.mean, given.std))
    scaled = weight.float() / std  # (outputs, channels, height, width)
    constant = (scaled * mean).sum(dim=(1, 2, 3))
    moved = state[where].float() + (-constant if where.endswith("bias") else constant)
    new = {f"{first}.weight": scaled, where: moved}
    return Rescaled(state={**state, **new}, changed=tuple(new), source=given.name)
