"""What networks for images and for volumes have in common: convolutions by dimension, sizes, padding and cropping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
UP_CONVOLUTIONS = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@runtime_checkable
class Surrounded(Protocol):
    """A network whose boxes come with so many voxels of their volume on every side, of which it predicts nothing."""

    margin_voxels: int


def margin_of(network: nn.Module) -> int:
    """Returns how many voxels around a box a network is given on every side; 0 for most."""
    return network.margin_voxels if isinstance(network, Surrounded) else 0


def padded(images: Tensor, multiple: int) -> Tensor:
    """Returns images with zeros at the end of every side that `multiple` does not divide."""
    ends = [
        pad for side in reversed(images.shape[2:]) for pad in (0, -side % multiple)
    ]  # F.pad begins at the last axis
    return F.pad(images, ends)


def cropped(maps: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Returns the first `sides` pixels of maps (N, C, [D,] H, W)."""
    return window(maps, [slice(side) for side in sides])


def window(maps: Tensor, cuts: Sequence[slice]) -> Tensor:
    """Returns a part of maps (N, C, [D,] H, W), given one slice for each axis of [D,] H, W."""
    everything = slice(None)
    return maps[(everything, everything, *cuts)]


def require_size(network: str, images: Tensor, smallest: int, dimensions: int = 2) -> None:
    """Refuses images (N, C, [D,] H, W) that the network cannot read, or would shrink to nothing.

    Raises:
        ModelError: If there are more or fewer axes than `dimensions` says, or one is below `smallest` pixels.
    """
    sides = images.shape[2:]
    if len(sides) != dimensions:
        raise ModelError(
            f"{network} was built for {dimensions}D images, got {len(sides)}D ones; does data.items fit the network?"
        )
    if min(sides) < smallest:
        raise ModelError(
            f"{network} needs images of at least {_times([smallest] * dimensions)} pixels with this normalization, "
            f"got {_times(sides)}; raise {'data.image-size' if dimensions == 2 else 'data.volume-size'}"
        )


def _times(sides: Sequence[int]) -> str:
    return " x ".join(str(side) for side in sides)
