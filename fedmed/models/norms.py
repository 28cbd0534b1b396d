"""Normalization layers, by the name that a run file gives them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fedmed.errors import ModelError

Norm = Literal["batch", "group", "instance"]
MOST_GROUPS = 32  # Wu & He 2018, arXiv:1803.08494, table 3


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Returns a normalization layer for feature maps (N, channels, H, W), with a learned scale and shift.

    `batch` mixes the images of a batch and keeps running statistics, so it has no per-image gradient and cannot train
    under DP-SGD. `group` and `instance` look at one image at a time and keep no state. `instance` is undefined on
    feature maps of a single pixel.

    Args:
        kind: `batch`, `group` (see `group_count`) or `instance`.
        channels: Number of channels, at least 1.

    Raises:
        ModelError: If `kind` is none of the three.
    """
    match kind:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(group_count(channels), channels)
        case "instance":
            return nn.InstanceNorm2d(channels, affine=True)
    raise ModelError(f"model.norm is {kind!r}; expected batch, group or instance")


def group_count(channels: int) -> int:
    """Returns the largest number of groups, at most 32, that divides `channels` and leaves two or more in each.

    A group of one channel would be instance normalization: it erases every channel's mean, and with it how strongly a
    finding shows. A prime number of channels makes a single group (layer normalization).
    """
    most = min(MOST_GROUPS, channels // 2)
    return max((groups for groups in range(1, most + 1) if channels % groups == 0), default=1)


def require_size(network: str, images: Tensor, smallest: int) -> None:
    """Refuses images (N, C, H, W) that the network would shrink to nothing.

    Raises:
        ModelError: If H or W is below `smallest` pixels.
    """
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise ModelError(
            f"{network} needs images of at least {smallest} x {smallest} pixels with this normalization, "
            f"got {height} x {width}; raise data.image-size"
        )
