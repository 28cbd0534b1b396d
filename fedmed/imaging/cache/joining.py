"""Many small segments made one: a hospital that adds a few images a day would map hundreds of files otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from fedmed.imaging.cache.index import Entry, Index, Place
from fedmed.imaging.cache.segments import Flat, SegmentWriter, intact, mapped, segment_file, view

MOST_SEGMENTS = 16  # that a set is gathered from; each costs a file descriptor or two and a step in every batch


def joined(index: Index, folder: Path, recipe: str, entries: Mapping[bytes, Entry]) -> bool:
    """Copy the rows of a set that lie in small segments into one new one, if they lie in too many.

    Another process that maps the old segments goes on with them. What is damaged stays where it is, to be found there.

    Args:
        index: is told of the new places.
        folder: of the segments.
        recipe: of all these rows, as the index has it.
        entries: of the set.

    Returns:
        Whether any row has moved.

    Raises:
        OSError: there is no room.
    """
    sizes = Counter(entry.segment for entry in entries.values())
    if len(sizes) <= MOST_SEGMENTS:
        return False
    (largest, _), *_ = sizes.most_common(1)
    lanes: dict[tuple[str, str], Flat] = {}
    moved: dict[bytes, Entry] = {}
    with closing(SegmentWriter(folder)) as writer:
        for key, entry in entries.items():
            if entry.segment == largest:
                continue
            image = _copied(writer, folder, lanes, entry.segment, "images", entry.image)
            mask = None if entry.mask is None else _copied(writer, folder, lanes, entry.segment, "masks", entry.mask)
            if image is not None and (mask is None) == (entry.mask is None):
                moved[key] = Entry(segment=writer.name, image=image, mask=mask)
        writer.settle()
        if moved:
            index.move(writer.name, recipe, moved)
            writer.committed = True
    return bool(moved)


def _copied(
    writer: SegmentWriter, folder: Path, lanes: dict[tuple[str, str], Flat], segment: str, kind: str, place: Place
) -> Place | None:
    name = (segment, place.lane)
    try:
        if name not in lanes:
            lanes[name] = mapped(segment_file(folder, *name))
    except OSError:
        return None
    array = view(lanes[name], place)
    return writer.append(kind, array) if array is not None and intact(lanes[name], place) else None
