"""From rows of a manifest to arrays: what is kept is mapped, and what is missing is decoded and kept."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedmed import __version__
from fedmed.errors import DataError, UnfitRow, UnreadableImage
from fedmed.imaging.cache.digests import Digests
from fedmed.imaging.cache.index import DAMAGED, Entry, Index, Place
from fedmed.imaging.cache.joining import joined
from fedmed.imaging.cache.segments import Flat, SegmentWriter, intact, mapped, segment_file, view
from fedmed.imaging.cache.upkeep import discard, keep_within, limit_reached, opened_folder, remove
from fedmed.imaging.decoding import decoded
from fedmed.imaging.manifest import Row
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.stored import Located, Stored
from fedmed.types import OnProgress

FORMAT = 3  # to be raised when reading or resizing changes what ends up on disk
ATTEMPTS = 4  # to map what the index names, while others remove segments or damage is found
COMMIT_BYTES = 64 * 2**20
COMMIT_S = 2.0  # work that a killed process loses at most, beside the row in hand
CHECKED_BYTES = 32 * 2**20  # of a set, drawn at random whenever it is opened
GIB = 2**30
DECODERS = ("pydicom", "python-gdcm", "pyjpegls", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pylibjpeg-libjpeg", "pillow",
            "nibabel", "highdicom")  # fmt: skip
PASSING = ("its decoder", "needs more memory")  # reasons that may not be those of the next attempt


class DamagedSegment(Exception):
    """A segment does not hold what the index says, or is gone."""


def kept(
    rows: Sequence[Row],
    recipe: Recipe,
    cache_dir: Path,
    *,
    limit_gib: float,
    processes: int = 1,
    progress: OnProgress | None = None,
    lenient: bool = False,
) -> Stored:
    """Map the rows that are kept; decode and keep the others.

    Args:
        rows: of a manifest.
        recipe: how they are read.
        cache_dir: the cache; made if there is none.
        limit_gib: size above which the sets used longest ago are removed.
        processes: decoding processes.
        progress: told of the rows that are decoded.
        lenient: whether a row that does not fit the task is as good as unreadable.

    Raises:
        DataError: the cache cannot be written, or its size does not suffice.
        UnfitRow: a mask does not fit its image or the task.
    """
    try:
        folder = opened_folder(cache_dir)
        for _ in range(ATTEMPTS):
            try:
                with closing(Index(folder)) as index:
                    return _kept(index, folder, rows, recipe, limit_gib, processes, progress, lenient=lenient)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) not in DAMAGED:
                    raise
                discard(folder)
            except DamagedSegment:
                continue
    except sqlite3.Error as error:
        raise _unusable(str(error)) from None
    except OSError as error:
        raise _unusable(error.strerror or "no reason given") from None
    raise _unusable("it is damaged again and again")


def _unusable(reason: str) -> DataError:
    return DataError(f"the image cache cannot be used ({reason.lower()}); mend it, or choose another folder")


def _kept(
    index: Index,
    folder: Path,
    rows: Sequence[Row],
    recipe: Recipe,
    limit_gib: float,
    processes: int,
    progress: OnProgress | None,
    *,
    lenient: bool,
) -> Stored:
    keys, unreadable = _keys(index, rows, recipe)
    wanted = list(keys.values())
    entries, failures = index.entries(wanted), index.failures(wanted, _decoders())
    missing = {keys[row.number]: row for row in reversed(rows) if row.number in keys}
    missing = {key: row for key, row in reversed(missing.items()) if key not in entries and key not in failures}
    if missing:
        passing = _Builder(index, folder, recipe, limit_gib, lenient=lenient).build(missing, processes, progress)
        entries, failures = index.entries(wanted), {**index.failures(wanted, _decoders()), **passing}
    if joined(index, folder, json.dumps(recipe.settings(), sort_keys=True), entries):
        keep_within(folder, index, limit_gib * GIB)  # removes what was left behind
        entries = index.entries(wanted)
    unreadable |= {number: failures[key] for number, key in keys.items() if key in failures and key not in entries}
    found = {row.number: entries[keys[row.number]] for row in rows if keys.get(row.number) in entries}
    if len(found) + len(unreadable) < len(rows):
        raise DamagedSegment  # another process removed some of it meanwhile
    lanes = _mapped(index, folder, list(found.values()))
    index.touch({entry.segment for entry in found.values()})
    return Stored(
        images=tuple(_located(lanes, entry, entry.image) for entry in found.values()),
        masks=tuple(_located(lanes, entry, entry.mask) for entry in found.values() if entry.mask is not None),
        unreadable=unreadable,
    )


def _keys(index: Index, rows: Sequence[Row], recipe: Recipe) -> tuple[dict[int, bytes], dict[int, str]]:
    """The key of every row by number, and why some have none: files that cannot be read."""
    digests, keys, unreadable, settings = Digests(index), {}, {}, recipe.settings()
    for row in rows:
        try:
            files = [_file(digests, path) for path in (*row.modalities, *((row.mask,) if row.mask else ()))]
        except UnreadableImage as error:
            unreadable[row.number] = str(error)
            continue
        facts = [FORMAT, __version__, settings, *files]
        keys[row.number] = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=32).digest()
    digests.keep()
    return keys, unreadable


def _file(digests: Digests, path: Path | None) -> tuple[str, str]:
    """What counts of a file. A missing modality has a place too: the others are not the same item without it."""
    return ("", "") if path is None else (_suffix(path), digests.of(path).hex())


def _suffix(path: Path) -> str:
    """The part of a name that decides how a file is read."""
    name = path.name.lower()
    return next((suffix for suffix in (".nii", ".nii.gz") if name.endswith(suffix)), "")


@cache
def _decoders() -> str:
    """What decodes here. What one decoder refuses, another version may read."""
    found = []
    for name in DECODERS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


class _Builder:
    """Decodes rows into one new segment and commits them again and again."""

    def __init__(self, index: Index, folder: Path, recipe: Recipe, limit_gib: float, *, lenient: bool) -> None:
        self._lenient = lenient
        self._index, self._folder, self._recipe, self._limit_gib = index, folder, recipe, limit_gib
        self._entries: dict[bytes, Entry] = {}
        self._failures: dict[bytes, str] = {}
        self._bytes, self._committed = 0, time.monotonic()

    def build(self, missing: Mapping[bytes, Row], processes: int, progress: OnProgress | None) -> dict[bytes, str]:
        """Keep every row, or why it cannot be read; the reasons that may pass are not kept but returned."""
        passing: dict[bytes, str] = {}
        with closing(SegmentWriter(self._folder)) as writer:
            results = decoded(list(missing.values()), self._recipe, processes=processes)
            with closing(results):
                for done, (key, arrays) in enumerate(zip(missing, results, strict=True), start=1):
                    if isinstance(arrays, UnfitRow) and not self._lenient:
                        raise arrays
                    if not isinstance(arrays, DataError):
                        image = writer.append("images", arrays["images"])
                        mask = writer.append("masks", arrays["masks"]) if "masks" in arrays else None
                        self._entries[key] = Entry(segment=writer.name, image=image, mask=mask)
                        self._bytes += sum(array.nbytes for array in arrays.values())
                    elif isinstance(arrays, UnfitRow) or str(arrays).startswith(PASSING):
                        passing[key] = str(arrays)
                    else:
                        self._failures[key] = str(arrays)
                    if self._bytes >= COMMIT_BYTES or time.monotonic() - self._committed >= COMMIT_S:
                        self._commit(writer)
                    if progress is not None:
                        progress(done, len(missing))
            self._commit(writer)
        return passing

    def _commit(self, writer: SegmentWriter) -> None:
        """Bytes first, then the index; and no more of them than the limit allows."""
        writer.settle()
        if self._entries and keep_within(self._folder, self._index, self._limit_gib * GIB) > self._limit_gib * GIB:
            raise limit_reached(self._limit_gib)
        recipe = json.dumps(self._recipe.settings(), sort_keys=True)
        self._index.add(writer.name, recipe, self._entries, self._failures, _decoders())
        writer.committed |= bool(self._entries)
        self._entries, self._failures, self._bytes, self._committed = {}, {}, 0, time.monotonic()


def _mapped(index: Index, folder: Path, entries: Sequence[Entry]) -> dict[tuple[str, str], Flat]:
    """Every lane that the entries lie in, checked.

    All places must lie inside their lane, and of the arrays themselves a sample must have its checksum: to read all
    of a large set at every start would take minutes.

    Raises:
        DamagedSegment: one was damaged, and is removed, or was removed by another process.
    """
    lanes: dict[tuple[str, str], Flat] = {}
    places = [(entry.segment, place) for entry in entries for place in (entry.image, entry.mask) if place is not None]
    try:
        for name in sorted({(segment, place.lane) for segment, place in places}):
            lanes[name] = mapped(segment_file(folder, *name))
    except OSError:
        index.forget(name[0])
        raise DamagedSegment from None
    random.shuffle(places)
    unchecked = CHECKED_BYTES
    for segment, place in places:
        found = view(lanes[segment, place.lane], place)
        sound = found is not None
        if found is not None and unchecked > 0:
            unchecked -= found.nbytes
            sound = intact(lanes[segment, place.lane], place)
        if not sound:
            del found
            lanes.clear()
            if not remove(folder, index, segment):  # others map it; what is wrong must not be found by anybody else
                index.forget(segment)
            raise DamagedSegment
    return lanes


def _located(lanes: Mapping[tuple[str, str], Flat], entry: Entry, place: Place) -> Located:
    return Located(lane=lanes[entry.segment, place.lane], offset=place.offset, shape=place.shape)
