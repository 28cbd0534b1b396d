"""One decoded image through a network: probabilities, or maps over all that the network is shown of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed.errors import FedmedError, ModelError
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.stored import Tiles
from fedmed.training.evaluate import predictions
from fedmed.training.network import FlatNetwork
from fedmed.training.predict.kept import Kept
from fedmed.training.tiles import parts, volume_predictions

Maps = NDArray[np.float32]


def image_logits(kept: Kept, images: NDArray[Any]) -> NDArray[np.float32]:
    """Logits of every item of an image, in the way in which the network was evaluated.

    Args:
        kept: a classifier.
        images: (n, C, …), what decoding gives.

    Returns:
        (n, labels): n slices, frames or patches, or 1.

    Raises:
        ModelError: the network cannot read it.
    """
    data = _dataset(kept, images, masks=False)
    batches = _tried(lambda: [logits for _, logits, _ in predictions(kept.network, data, np.arange(len(data)))])
    return _numbers(np.concatenate(batches))


def image_maps(kept: Kept, images: NDArray[Any], make: Callable[[Tensor], Tensor]) -> Maps:
    """Maps over an image; those of patches that overlap are put together as in evaluation.

    Args:
        kept: whose images and device.
        images: (n, C, …), what decoding gives.
        make: tensors (n, C, …) to maps (n, K, …) of the same size, on the network's device.

    Returns:
        (K, n, S, S) for pictures and slices, (K, D, H, W) for volumes and patches.

    Raises:
        ModelError: the network cannot read it.
    """
    data = _dataset(kept, images, masks=True)
    function = FlatNetwork(_Function(make, kept.network.margin_voxels), kept.network.device)
    with torch.no_grad():
        if data.tiles is not None:
            return _numbers(
                _tried(lambda: [maps for _, maps, _ in volume_predictions(function, data, np.arange(len(data)))])[0][0]
            )
        rows = np.arange(len(data))
        found = _tried(lambda: [_batch(function, data, chosen) for chosen in parts(function, data, rows)])
    maps = np.concatenate(found)
    return _numbers(maps[0] if kept.recipe.depth else maps.swapaxes(0, 1))


class _Function(nn.Module):
    """A function where a network is expected."""

    def __init__(self, function: Callable[[Tensor], Tensor], margin_voxels: int) -> None:
        """The function may use a network, whose parameters are not this module's, and wants a margin as that does."""
        super().__init__()
        self._function = function
        self.margin_voxels = margin_voxels

    def forward(self, images: Tensor) -> Tensor:
        """The function's maps."""
        return self._function(images)


def _batch(function: FlatNetwork, data: Dataset, rows: NDArray[np.int64]) -> Maps:
    images, _ = data.batch(rows, margin=function.margin_voxels)
    maps: Maps = function(images.to(function.device)).float().cpu().numpy()
    return maps


def _dataset(kept: Kept, images: NDArray[Any], *, masks: bool) -> Dataset:
    """One image as a data set, with targets that nobody looks at."""
    box = kept.config.data.volume_size if kept.recipe.items == "patches" else ()
    if not box:
        targets = np.zeros((len(images), len(kept.labels)), np.float32)
        return Dataset(images, targets, ("",) * len(images), channels=kept.config.model.in_channels)
    tiles = Tiles.over([images[0]], box)
    whole = np.zeros((1, *images.shape[2:]), np.uint8)
    return Dataset(
        tiles,
        Tiles.over([whole], box) if masks else np.zeros((len(tiles), len(kept.labels)), np.float32),
        ("",) * len(tiles),
        channels=kept.config.model.in_channels,
        rows=np.zeros(len(tiles), np.int64),
        labels=int(masks),
    )


def _tried(run: Callable[[], list[Maps]]) -> list[Maps]:
    """What a network gives for an image, or why it gives nothing: a user's own network may raise anything."""
    try:
        return run()
    except FedmedError:
        raise
    except Exception as error:
        text = f"the network fails on it ({type(error).__name__})"
        raise ModelError.told(text) from None


def _numbers(values: Maps) -> Maps:
    if not np.isfinite(values).all():
        raise ModelError("the network's output for it is not a number")
    return values
