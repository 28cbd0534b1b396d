"""Dense inference over images too large for one pass, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn

from fedmed.errors import ModelError
from fedmed.models.spatial import window


def logits_by_tiles(network: nn.Module, images: Tensor, *, tile: Sequence[int], margin: int) -> Tensor:
    """Returns the logits of a segmentation network, computed tile by tile without gradients.

    Every tile is shown with up to `margin` pixels of its surroundings, and only its own pixels are kept, so no pixel is
    decided twice. Where the network has no normalization that looks at the whole image (BatchNorm in evaluation mode,
    or none) and `margin` is at least the reach of its convolutions, the result equals that of a single pass: for
    DeepMedic `margin` >= 26 and tiles and margins that 3 divides, that is 27. GroupNorm and InstanceNorm take their
    statistics over each tile with its margin, as they did over segments of that size in training.

    Args:
        network: Takes (N, C, [D,] h, w) and returns logits (N, outputs, [D,] h, w).
        images: (N, C, [D,] H, W).
        tile: Pixels of a tile along [D,] H, W; those at the end may be smaller.
        margin: Pixels of context on each side.

    Returns:
        Logits (N, outputs, [D,] H, W) on the device of the images.

    Raises:
        ModelError: If the tile does not have one size of at least 1 for each axis, or the margin is negative.
    """
    sides = images.shape[2:]
    if len(tile) != len(sides) or min(tile) < 1 or margin < 0:
        raise ModelError(f"tiles of {tuple(tile)} pixels with a margin of {margin} do not fit {len(sides)}D images")
    whole: Tensor | None = None
    with torch.no_grad():
        for corner in product(*(range(0, side, step) for side, step in zip(sides, tile, strict=True))):
            ends = [min(start + step, side) for start, step, side in zip(corner, tile, sides, strict=True)]
            shown = [slice(max(0, start - margin), end + margin) for start, end in zip(corner, ends, strict=True)]
            kept = [
                slice(start - cut.start, end - cut.start) for start, end, cut in zip(corner, ends, shown, strict=True)
            ]
            logits = window(network(window(images, shown)), kept)
            if whole is None:
                whole = logits.new_empty((*logits.shape[:2], *sides))
            window(whole, [slice(start, end) for start, end in zip(corner, ends, strict=True)]).copy_(logits)
    if whole is None:
        raise ModelError("an image without pixels has no logits")
    return whole
