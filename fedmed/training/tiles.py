"""Dense inference over whole volumes: tiles that overlap, put together with weights that fall towards their edges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmed.imaging.dataset import Dataset
from fedmed.training.network import FlatNetwork
from fedmed.training.sampling import Rows

SHARPNESS = 0.125  # standard deviation of a tile's weights, as a share of its side (Isensee et al. 2021, nnU-Net)
BATCH_SIZE = 32  # items in one forward pass; memory, not accuracy, depends on it
TILES_AT_ONCE = 4
VOXELS_AT_ONCE = BATCH_SIZE * 256 * 256  # of larger items fewer go at once: one volume of 128³


def volume_predictions(
    network: FlatNetwork, data: Dataset, rows: Rows
) -> Iterator[tuple[Rows, NDArray[np.float32], NDArray[np.float32]]]:
    """Yield (first row of the volume, logits, targets) volume by volume, one at a time in memory.

    Args:
        network: in evaluation mode; its logits have the size of a tile.
        data: a data set of tiles.
        rows: (n,) tiles; all of the volumes that are to be predicted.

    Returns:
        Logits and targets (1, labels, D, H, W), of the size of the volume.
    """
    tiles = data.tiles
    assert tiles is not None
    for volume in dict.fromkeys(tiles.volume[rows].tolist()):
        mine = rows[tiles.volume[rows] == volume]
        whole = tuple(int(side) for side in tiles.whole[mine[0]])
        logits = targets = weights = torch.zeros(0)
        for chosen in parts(network, data, mine, most=TILES_AT_ONCE):
            images, truth = data.batch(chosen, margin=network.margin_voxels)
            truth = within(truth, network.margin_voxels)
            output = network(images.to(network.device)).float().cpu()
            if not len(logits):
                logits = torch.zeros(output.shape[1], *whole)
                targets, weights = torch.zeros_like(logits), torch.zeros(whole)
                window = tile_window(output.shape[2:])
            for each, mask, corner in zip(output, truth, tiles.corner[chosen], strict=True):
                place = tuple(slice(int(at), int(at) + side) for at, side in zip(corner, window.shape, strict=True))
                inside = tuple(slice(0, side) for side in weights[place].shape)
                logits[:, *place] += (each * window)[:, *inside]
                targets[:, *place] = mask[:, *inside]
                weights[place] += window[inside]
        yield mine[:1], (logits / weights)[None].numpy(), targets[None].numpy()


def parts(network: FlatNetwork, data: Dataset, rows: Rows, *, most: int = BATCH_SIZE) -> Iterator[Rows]:
    """Rows as they go through a network together where nothing is trained: at most so many, and fewer large ones."""
    voxels = math.prod(side + 2 * network.margin_voxels for side in data.shape[1:])
    size = max(1, min(most, VOXELS_AT_ONCE // max(voxels, 1)))
    return (rows[start : start + size] for start in range(0, len(rows), size))


def within(targets: Tensor, margin: int) -> Tensor:
    """Masks (n, labels, …) without the margin that came with them; labels (n, labels) as they are."""
    inside = slice(margin, -margin or None)
    return targets[(..., *[inside] * (targets.ndim - 2))]


def tile_window(size: tuple[int, ...]) -> Tensor:
    """What each voxel of a tile weighs: a Gaussian around the middle, positive everywhere.

    Returns:
        (d, h, w) in (0, 1].
    """
    window = torch.ones(())
    for side in size:
        middle = torch.arange(side) - (side - 1) / 2
        window = window[..., None] * torch.exp(-0.5 * (middle / (SHARPNESS * side)) ** 2).clamp(min=1e-3)
    return window
