"""Decoded images, kept in memory-mapped files that all processes of a machine share.

A cache is one folder per set of images, named by a hash of everything that decides its content: the relative paths,
sizes and modification times of the files, and how they are read. It is built under another name and renamed when it
is complete, so that a killed process leaves nothing that looks finished, and of two that build at once the first
wins. The folder is for its owner alone: it holds pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError, UnreadableImage

FORMAT = 1  # to be raised when reading or resizing changes what ends up on disk
ABANDONED_S = 24 * 3600.0

Decoded = tuple[NDArray[np.uint16], NDArray[np.uint8] | None]  # (C, S, S) image; (L, S, S) mask for segmentation


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The readable images of a set, in the order of its rows."""

    images: NDArray[np.uint16]  # (N, C, S, S)
    masks: NDArray[np.uint8] | None  # (N, L, S, S), 0 or 1
    unreadable: dict[int, str]  # row number -> reason


def key_of(files: Sequence[Path], *, base: Path, settings: dict[str, Any]) -> str:
    """A name for the decoded form of `files`, which changes when a file or a setting does."""
    facts = [[os.path.relpath(file, base), *_size_and_time(file)] for file in files]
    return hashlib.sha256(json.dumps([FORMAT, settings, facts]).encode()).hexdigest()[:32]


def decode_all(decode: Callable[[int], Decoded], numbers: Sequence[int], folder: Path | None) -> Pixels:
    """Decode every row, into memory or, image by image, into `folder`.

    Args:
        decode: row index -> image and mask; UnreadableImage if it cannot be read.
        numbers: the manifest's row number of each index.
        folder: the cache, read if it exists, else built; None = memory.

    Raises:
        DataError: the cache cannot be written.
    """
    if folder is None:
        return _in_memory(decode, numbers)
    try:
        if not folder.is_dir():
            _build(decode, numbers, folder)
        return _opened(folder)
    except (OSError, KeyError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        raise DataError(f"the image cache cannot be used ({reason}); delete its folder or choose another") from error


def _in_memory(decode: Callable[[int], Decoded], numbers: Sequence[int]) -> Pixels:
    unreadable: dict[int, str] = {}
    decoded = list(_decoded(decode, numbers, unreadable))
    masks = [mask for _, mask in decoded if mask is not None]
    return Pixels(
        images=np.stack([image for image, _ in decoded]) if decoded else np.zeros((0, 0, 0, 0), np.uint16),
        masks=np.stack(masks) if masks else None,
        unreadable=unreadable,
    )


def _decoded(decode: Callable[[int], Decoded], numbers: Sequence[int], unreadable: dict[int, str]) -> Iterator[Decoded]:
    """The readable ones; the others are noted in `unreadable`."""
    for index, number in enumerate(numbers):
        try:
            yield decode(index)
        except UnreadableImage as error:
            unreadable[number] = str(error)


def _build(decode: Callable[[int], Decoded], numbers: Sequence[int], folder: Path) -> None:
    """Write images.raw, masks.raw and facts.json under a temporary name, then rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    with _temporary_folder(folder.parent) as building:
        facts: dict[str, Any] = {"images": [0, 0, 0, 0], "masks": None}
        unreadable: dict[int, str] = {}
        with (building / "images.raw").open("wb") as images, (building / "masks.raw").open("wb") as masks:
            for count, (image, mask) in enumerate(_decoded(decode, numbers, unreadable), start=1):
                images.write(np.ascontiguousarray(image, "<u2").tobytes())
                facts["images"] = [count, *image.shape]
                if mask is not None:
                    masks.write(mask.tobytes())
                    facts["masks"] = [count, *mask.shape]
            for file in (images, masks):
                file.flush()
                os.fsync(file.fileno())
        facts["unreadable"] = unreadable
        (building / "facts.json").write_text(json.dumps(facts))
        try:
            building.rename(folder)  # atomic; fails if another process was faster
        except OSError:
            if not folder.is_dir():
                raise


def _opened(folder: Path) -> Pixels:
    facts = json.loads((folder / "facts.json").read_text())
    masks = facts["masks"]
    return Pixels(
        images=_mapped(folder / "images.raw", "<u2", facts["images"]),
        masks=None if masks is None else _mapped(folder / "masks.raw", "u1", masks),
        unreadable={int(number): reason for number, reason in facts["unreadable"].items()},
    )


def _mapped(path: Path, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    if 0 in shape:
        return np.zeros(tuple(shape), dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=tuple(shape))


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A private folder that is gone afterwards, unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what killed processes left behind a day ago or earlier."""
    for folder in parent.glob("building-*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        facts = file.stat()
    except OSError:
        return (-1, -1)
    return facts.st_size, facts.st_mtime_ns
