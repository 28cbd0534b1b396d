"""What a cache holds, how large it is, and what goes when it is too large. What is in use never goes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import DataError
from fedmed.imaging.cache.index import NAME, Index
from fedmed.imaging.cache.segments import Flat, intact, mapped, segment_file
from fedmed.imaging.recipe import Recipe

FOLDER = "decoded-2"  # inside the cache folder; the number rises when the form of what is inside changes
ORPHAN_S = 600.0  # age at which an unlocked file that no index speaks of was left by a killed process
SEGMENT_FILE = re.compile(r"([0-9a-f]{16})\.[a-z]+\.u[12]")


@dataclass(frozen=True, kw_only=True)
class KeptSet:
    """Everything that was decoded in one way."""

    recipe: Recipe
    rows: int
    bytes: int
    used: float  # seconds since the epoch


def opened_folder(cache_dir: Path) -> Path:
    """The folder that the cache lives in, made for its owner alone.

    Raises:
        OSError: it cannot be made.
    """
    folder = cache_dir / FOLDER
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def kept_sets(folder: Path, index: Index) -> list[KeptSet]:
    """What is kept, by recipe, the largest first."""
    sizes, rows_in = segment_sizes(folder), index.rows_in()
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for segment in index.segments():
        facts = sums[segment.recipe]
        facts[0] += rows_in.get(segment.name, 0)
        facts[1] += sizes.get(segment.name, 0)
        facts[2] = max(facts[2], segment.used)
    found = [
        KeptSet(recipe=Recipe.from_settings(json.loads(text)), rows=int(rows), bytes=int(size), used=used)
        for text, (rows, size, used) in sums.items()
    ]
    return sorted(found, key=lambda kept: -kept.bytes)


def segment_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every segment on the disk, whether an index speaks of it or not."""
    sizes: dict[str, int] = defaultdict(int)
    for path, name in _files(folder):
        try:
            sizes[name] += path.stat().st_size
        except FileNotFoundError:  # another process removes it
            continue
    return dict(sizes)


def keep_within(folder: Path, index: Index, limit_bytes: float) -> int:
    """Remove what killed processes left, then the segments used longest ago until the rest fits.

    Returns:
        Bytes that are left; above the limit only if all of it is in use.
    """
    _remove_orphans(folder, index)
    sizes = segment_sizes(folder)
    left = sum(sizes.values())
    for segment in index.segments():
        if left <= limit_bytes:
            break
        if remove(folder, index, segment.name):
            left -= sizes.get(segment.name, 0)
    return left


def remove(folder: Path, index: Index, segment: str) -> bool:
    """Remove a segment, unless any process maps or writes it.

    Returns:
        Whether it is gone.
    """
    files = [path for path, name in _files(folder) if name == segment]
    with _alone(files) as alone:
        if not alone:
            return False
        index.forget(segment)  # first: nobody finds it any more
        for path in files:
            path.unlink(missing_ok=True)
    return True


def damaged(folder: Path, index: Index) -> int:
    """Read everything that is kept, and remove the segments that do not hold what was written.

    Returns:
        How many segments were damaged. One that is in use is forgotten now and removed later.
    """
    wrong = [segment.name for segment in index.segments() if not _sound(folder, index, segment.name)]
    for name in wrong:
        if not remove(folder, index, name):
            index.forget(name)
    return len(wrong)


def _sound(folder: Path, index: Index, segment: str) -> bool:
    lanes: dict[str, Flat] = {}
    for entry in index.entries_in(segment):
        for place in (entry.image, entry.mask):
            if place is None:
                continue
            try:
                if place.lane not in lanes:
                    lanes[place.lane] = mapped(segment_file(folder, segment, place.lane))
            except OSError:
                return False
            if not intact(lanes[place.lane], place):
                return False
    return True


def discard(folder: Path) -> None:
    """Begin anew with a damaged index: it goes, and with it every segment that is not in use."""
    for path in [folder / NAME, *folder.glob(f"{NAME}-*")]:
        path.unlink(missing_ok=True)
    for path, _ in list(_files(folder)):
        with _alone([path]) as alone:
            if alone:
                path.unlink(missing_ok=True)


def limit_reached(limit_gib: float) -> DataError:
    """What to say when everything that is kept is in use, and there is more to come."""
    text = f"the decoded images that are in use need more than data.cache-gib = {limit_gib:g}; allow the cache more"
    return DataError.told(text)


def _remove_orphans(folder: Path, index: Index) -> None:
    known = {segment.name for segment in index.segments()}
    for path, name in list(_files(folder)):
        try:
            abandoned = name not in known and time.time() - path.stat().st_mtime > ORPHAN_S
        except FileNotFoundError:
            continue
        if abandoned:
            with _alone([path]) as alone:
                if alone:
                    path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every segment file, and the name of its segment."""
    for path in folder.iterdir():
        found = SEGMENT_FILE.fullmatch(path.name)
        if found:
            yield path, found[1]


@contextmanager
def _alone(files: list[Path]) -> Iterator[bool]:
    """Whether nobody uses any of these files; while the block runs, nobody begins to."""
    descriptors: list[int] = []
    try:
        for path in files:
            try:
                descriptors.append(os.open(path, os.O_RDONLY))
                fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                yield False
                return
        yield True
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
