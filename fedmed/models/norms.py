"""Normalization layers, by the name that a run file gives them."""

from __future__ import annotations

from typing import Literal

from torch import nn

from fedmed.errors import ModelError

Norm = Literal["batch", "group", "instance", "none"]
MOST_GROUPS = 32  # Wu & He 2018, arXiv:1803.08494, table 3


def norm_layer(kind: Norm, channels: int, dimensions: int = 2) -> nn.Module:
    """Returns a normalization layer for feature maps (N, channels, [D,] H, W), with a learned scale and shift.

    `batch` mixes the images of a batch and keeps running statistics, so it has no per-image gradient and cannot train
    under DP-SGD. `group` and `instance` look at one image at a time and keep no state. `instance` is undefined on
    feature maps of a single pixel. `none` is the identity; the convolution before it then needs a bias.

    Args:
        kind: `batch`, `group` (see `group_count`), `instance` or `none`.
        channels: Number of channels, at least 1.
        dimensions: 2 for images, 3 for volumes.

    Raises:
        ModelError: If `kind` is none of the four, or `dimensions` is neither 2 nor 3.
    """
    if dimensions not in (2, 3):
        raise ModelError(f"a network has 2 or 3 dimensions, got {dimensions}")
    match kind:
        case "batch":
            return nn.BatchNorm2d(channels) if dimensions == 2 else nn.BatchNorm3d(channels)
        case "group":
            return nn.GroupNorm(group_count(channels), channels)
        case "instance":
            layer = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d
            return layer(channels, affine=True)
        case "none":
            return nn.Identity()
    raise ModelError(f"model.norm is {kind!r}; expected batch, group or instance, or none for a network without")


def group_count(channels: int) -> int:
    """Returns the largest number of groups, at most 32, that divides `channels` and leaves two or more in each.

    A group of one channel would be instance normalization: it erases every channel's mean, and with it how strongly a
    finding shows. A prime number of channels makes a single group (layer normalization).
    """
    most = min(MOST_GROUPS, channels // 2)
    return max((groups for groups in range(1, most + 1) if channels % groups == 0), default=1)
