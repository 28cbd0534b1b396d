"""Where the items of a data set lie, and how some of them are gathered as float32.

Both kinds refer to larger arrays, in memory or memory-mapped, and copy nothing until items are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError

Array = NDArray[Any]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]
LEVELS = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}  # the number that stands for 1.0


@dataclass(frozen=True, kw_only=True)
class Located:
    """An array that lies somewhere in a flat one."""

    lane: Array  # (elements,)
    offset: int  # elements
    shape: tuple[int, ...]

    def view(self) -> Array:
        """It, sharing memory with the lane."""
        return self.lane[self.offset : self.offset + math.prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The readable rows of a manifest, in order, and why the others are not there."""

    images: tuple[Located, ...]  # each (n, C, …): a row gives n items
    masks: tuple[Located, ...]  # empty, or one for each row
    unreadable: Mapping[int, str]  # row number -> reason


@dataclass(frozen=True, kw_only=True)
class Slots:
    """N items of one shape, each a slot of one of a few arrays."""

    sources: tuple[Array, ...]  # each (slots, C, …), uint8, uint16 or a float
    source: Numbers  # (N,) which of them
    slot: Numbers  # (N,)

    @classmethod
    def of(cls, array: Array) -> Slots:
        """The rows of one array (N, C, …)."""
        return cls(sources=(array,), source=np.zeros(len(array), np.int64), slot=np.arange(len(array)))

    @classmethod
    def at(cls, places: Sequence[Located]) -> Slots:
        """The items of one or more arrays (n, C, …), which lie in a few lanes at whole multiples of an item's size.

        Raises:
            DataError: the items are not of one shape.
        """
        shapes = {place.shape[1:] for place in places}
        if len(shapes) != 1:
            raise DataError("the items of this set differ in shape; one preset gives them different channels")
        shape = shapes.pop()
        lanes = {id(place.lane): place.lane for place in places}
        order, size = list(lanes), math.prod(shape)
        counts = [place.shape[0] for place in places]
        first = np.array([place.offset // size for place in places])
        within = np.arange(sum(counts)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(
            sources=tuple(lane[: len(lane) // size * size].reshape(-1, *shape) for lane in lanes.values()),
            source=np.repeat([order.index(id(place.lane)) for place in places], counts),
            slot=np.repeat(first, counts) + within,
        )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.slot)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item."""
        return tuple(self.sources[0].shape[1:])

    def gather(self, rows: Numbers, *, scaled: bool = True) -> Floats:
        """Items as float32, a copy.

        Args:
            rows: (n,) indices below `len(self)`.
            scaled: whole numbers become shares of the highest one, in [0, 1]; else they stay numbers.

        Returns:
            (n, C, …).
        """
        if len(self.sources) == 1:
            return _floats(self.sources[0][self.slot[rows]], scaled=scaled)
        gathered = np.empty((len(rows), *self.shape), np.float32)
        of_rows = self.source[rows]
        for number in np.unique(of_rows):
            here = of_rows == number
            gathered[here] = _floats(self.sources[number][self.slot[rows[here]]], scaled=scaled)
        return gathered


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """N boxes of one size cut out of volumes of any size; beyond the far edge of a smaller volume there is 0."""

    volumes: tuple[Array, ...]  # each (C, D, H, W)
    volume: Numbers  # (N,) which of them
    corner: Numbers  # (N, 3) the box's lowest voxel
    size: tuple[int, int, int]

    @classmethod
    def over(cls, volumes: Sequence[Array], size: tuple[int, ...]) -> Tiles:
        """All boxes of the regular grid over every volume (`grid`)."""
        grids = [grid(volume.shape[1:], size) for volume in volumes]
        return cls(
            volumes=tuple(volumes),
            volume=np.repeat(np.arange(len(grids)), [len(corners) for corners in grids]),
            corner=np.concatenate(grids) if grids else np.zeros((0, 3), np.int64),
            size=(size[0], size[1], size[2]),
        )

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.volume)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one box: (C, *size)."""
        return (self.volumes[0].shape[0], *self.size)

    @cached_property
    def shapes(self) -> Numbers:
        """(V, 3) voxels of every volume."""
        return np.array([volume.shape[1:] for volume in self.volumes], np.int64).reshape(-1, 3)

    def jittered(self, rows: Numbers, generator: np.random.Generator) -> Numbers:
        """Corners (n, 3) moved by up to half a step of the grid, and never over the edge."""
        steps = np.maximum(np.array(self.size) // 2, 1) // 2
        moved = self.corner[rows] + generator.integers(-steps, steps, (len(rows), 3), endpoint=True)
        room: Numbers = np.maximum(self.shapes[self.volume[rows]] - np.array(self.size), 0)
        inside: Numbers = np.clip(moved, 0, room)
        return inside

    def keeping_foreground(self, rows: Numbers, corners: Numbers) -> Numbers:
        """Corners (n, 3) as given, but a box's own one where only there it holds a class.

        Args:
            rows: (n,) indices below `len(self)`, of masks.
            corners: (n, 3) that the boxes were moved to.
        """
        at_home, moved = (self._holds_a_class(rows, places) for places in (self.corner[rows], corners))
        return np.where((at_home & ~moved)[:, None], self.corner[rows], corners)

    def _holds_a_class(self, rows: Numbers, corners: Numbers) -> NDArray[np.bool_]:
        found = np.zeros(len(rows), bool)
        for place, (number, corner) in enumerate(zip(self.volume[rows], corners.tolist(), strict=True)):
            box = tuple(slice(at, at + side) for at, side in zip(corner, self.size, strict=True))
            found[place] = self.volumes[number][:, *box].any()
        return found

    def gather(self, rows: Numbers, *, scaled: bool = True, corners: Numbers | None = None, margin: int = 0) -> Floats:
        """Boxes as float32, a copy.

        Args:
            rows: (n,) indices below `len(self)`.
            scaled: as for `Slots.gather`.
            corners: (n, 3) at which they are cut instead of their own.
            margin: voxels of the volume that come with a box on every side; outside the volume they are 0.

        Returns:
            (n, C, …) of `size` and twice the margin.
        """
        places = (self.corner[rows] if corners is None else corners) - margin
        sides = [side + 2 * margin for side in self.size]
        gathered = np.zeros((len(rows), self.shape[0], *sides), np.float32)
        for box, number, place in zip(gathered, self.volume[rows], places.tolist(), strict=True):
            there = tuple(slice(max(at, 0), at + side) for at, side in zip(place, sides, strict=True))
            part = self.volumes[number][:, *there]
            here = tuple(slice(max(-at, 0), max(-at, 0) + side) for at, side in zip(place, part.shape[1:], strict=True))
            box[:, *here] = _floats(part, scaled=scaled)
        return gathered


def grid(shape: tuple[int, ...], size: tuple[int, ...]) -> Numbers:
    """The corners of boxes that cover a volume: half a box apart, the last one flush with the far edge.

    Args:
        shape: of the volume, voxels.
        size: of a box.

    Returns:
        (n, 3), in order; only the origin along an axis that is not longer than the box.
    """
    starts = []
    for length, side in zip(shape, size, strict=True):
        last = max(length - side, 0)
        starts.append([*range(0, last, max(1, side // 2)), last])
    return np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int64)


def _floats(values: Array, *, scaled: bool) -> Floats:
    """As float32, whole numbers as shares of the highest one if `scaled`: one pass, in which numpy converts."""
    levels = LEVELS.get(values.dtype)
    if scaled and levels is not None:
        return np.multiply(values, np.float32(1 / levels), dtype=np.float32)
    return values.astype(np.float32, copy=False)


def check_unreadable(unreadable: Mapping[int, str], total: int, most: float) -> None:
    """Refuse a set of which too much, or everything, cannot be read.

    Args:
        unreadable: reasons by number of the row.
        total: rows.
        most: share of them that may be unreadable.

    Raises:
        DataError: as said.
    """
    count = len(unreadable)
    if not count or (count < total and count <= most * total):
        return
    first = ", ".join(f"row {number} ({reason})" for number, reason in sorted(unreadable.items())[:5])
    more = ", …" if count > 5 else ""
    rule = "" if count == total else f", above data.max-unreadable = {100 * most:g} %"
    text = f"{count} of {total} images ({100 * count / total:.1f} %) cannot be read{rule}: {first}{more}"
    raise DataError.told(text)  # numbers of rows, and what was wrong with the bytes
