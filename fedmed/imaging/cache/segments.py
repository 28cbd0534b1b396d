"""Segments: files of bare arrays, appended to by the one process that made them, and mapped by all others."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import secrets
import zlib
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.imaging.cache.index import Place

DTYPES: dict[str, np.dtype[Any]] = {"u1": np.dtype("u1"), "u2": np.dtype("<u2")}
Flat = NDArray[Any]


class SegmentWriter:
    """A new segment. It is locked as in use from its first byte until it is closed."""

    def __init__(self, folder: Path) -> None:
        """Choose a name; files appear when there is something to write."""
        self.name = secrets.token_hex(8)
        self.committed = False  # whether an index speaks of it
        self._folder = folder
        self._lanes: dict[str, FileIO] = {}

    def append(self, kind: str, array: NDArray[Any]) -> Place:
        """Write an array at the end of its lane.

        Args:
            kind: "images" or "masks".
            array: uint8 or uint16.

        Raises:
            OSError: it cannot be written.
        """
        name = f"u{array.dtype.itemsize}"
        data = np.ascontiguousarray(array, DTYPES[name])
        lane = self._lane(f"{kind}.{name}")
        offset, left = lane.tell() // data.itemsize, data.data.cast("B")
        checksum = zlib.crc32(left)
        while left:
            left = left[lane.write(left) :]
        return Place(lane=f"{kind}.{name}", offset=offset, shape=data.shape, checksum=checksum)

    def settle(self) -> None:
        """Bring everything to the disk, so that an index may speak of it."""
        for lane in self._lanes.values():
            os.fsync(lane.fileno())

    def close(self) -> None:
        """Close the files, and remove them if nobody will ever look for them."""
        for name, lane in self._lanes.items():
            if not self.committed:
                segment_file(self._folder, self.name, name).unlink(missing_ok=True)
            lane.close()
        self._lanes = {}

    def _lane(self, name: str) -> FileIO:
        if name not in self._lanes:
            path = segment_file(self._folder, self.name, name)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._lanes[name] = FileIO(descriptor, "wb")
        return self._lanes[name]


def segment_file(folder: Path, segment: str, lane: str) -> Path:
    """The file of one lane of a segment."""
    return folder / f"{segment}.{lane}"


def mapped(path: Path) -> Flat:
    """A lane as one flat array, memory-mapped and locked as in use for as long as any view of it lives.

    The lock belongs to the open file, which the mapping keeps open after the descriptor here is closed.

    Raises:
        OSError: it is gone, or cannot be mapped.
    """
    dtype = DTYPES[path.suffix[1:]]
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        count = os.fstat(file.fileno()).st_size // dtype.itemsize
        if count == 0:
            return np.zeros(0, dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype, count)


def view(lane: Flat, place: Place) -> NDArray[Any] | None:
    """The array at a place, shared with the lane; None if the lane ends before it."""
    count = math.prod(place.shape)
    part = lane[place.offset : place.offset + count]
    return part.reshape(place.shape) if len(part) == count else None


def intact(lane: Flat, place: Place) -> bool:
    """Whether the bytes at a place are those that were written there."""
    found = view(lane, place)
    return found is not None and zlib.crc32(found.data.cast("B")) == place.checksum
