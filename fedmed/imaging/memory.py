"""Decoded images in memory, for a set that is used once or must leave nothing on the disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError, UnfitRow
from fedmed.imaging.decoding import decoded
from fedmed.imaging.manifest import Row
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.stored import Located, Stored


def in_memory(rows: Sequence[Row], recipe: Recipe, *, processes: int = 1, lenient: bool = False) -> Stored:
    """Decode every row.

    Args:
        rows: of a manifest.
        recipe: how they are read.
        processes: decoding processes.
        lenient: whether a row that does not fit the task is as good as unreadable.

    Raises:
        UnfitRow: a mask does not fit its image or the task.
    """
    found, unreadable = [], {}
    for row, arrays in zip(rows, decoded(rows, recipe, processes=processes), strict=True):
        if isinstance(arrays, UnfitRow) and not lenient:
            raise arrays
        if isinstance(arrays, DataError):
            unreadable[row.number] = str(arrays)
        else:
            found.append(arrays)
    masks = [arrays["masks"] for arrays in found if "masks" in arrays]
    images = _in_lanes([arrays["images"] for arrays in found])
    return Stored(images=images, masks=_in_lanes(masks), unreadable=unreadable)


def _in_lanes(arrays: Sequence[NDArray[Any]]) -> tuple[Located, ...]:
    """The arrays of each type one after the other, so that a batch is gathered from few places."""
    parts: dict[np.dtype[Any], list[NDArray[Any]]] = defaultdict(list)
    ends: dict[np.dtype[Any], int] = defaultdict(int)
    offsets = []
    for array in arrays:
        parts[array.dtype].append(array.reshape(-1))
        offsets.append(ends[array.dtype])
        ends[array.dtype] += array.size
    lanes = {kind: np.concatenate(some) for kind, some in parts.items()}
    return tuple(
        Located(lane=lanes[array.dtype], offset=offset, shape=array.shape)
        for array, offset in zip(arrays, offsets, strict=True)
    )
