"""What a pull has done so far: one line of JSON for every object, and one for every series that is complete.

Everything in it is keyed or harmless. `pulled.csv` and all counts are made from it, so they never contradict it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedmed.errors import DataError
from fedmed.intake.tables import replace_table

JOURNAL, TABLE = ".journal.jsonl", "pulled.csv"
COLUMNS = ("patient_id", "study_uid", "series_uid", "image", "view", "age", "sex", "accession", "modality")

Line = dict[str, Any]


class Journal:
    """What was done already, by keyed UIDs, and a file to add to it."""

    def __init__(self, file: BinaryIO, folder: Path) -> None:
        """Take in what is there."""
        self._file, self._folder = file, folder
        self.done: dict[str, int] = {}  # series to how many objects it had
        self.objects: dict[str, set[str]] = defaultdict(set)  # of series that are not done
        self.unreadable: dict[str, set[str]] = {}  # objects, by series, that came and could not be read
        for line in _lines(folder):
            if "done" in line:
                self._close(line["done"])
            elif not line.get("unreadable"):
                self.objects[line["series"]].add(line["object"])
        for line in objects(folder):
            if line.get("unreadable"):
                self.unreadable.setdefault(line["series"], set()).add(line["object"])

    def open(self, series: str) -> set[str]:
        """The objects of a series that are there; one that was complete has grown since, or lacks unreadable ones."""
        if self.done.pop(series, 0):
            here = (line for line in objects(self._folder) if line["series"] == series)
            self.objects[series] |= {line["object"] for line in here if not line.get("unreadable")}
        return self.objects[series]

    def add(self, **line: Any) -> None:
        """One line in one write: a kill leaves it whole or torn, and a torn one is passed over."""
        self._file.write(json.dumps(line).encode() + b"\n")

    def end(self, series: str) -> None:
        """A series is complete, and on disk."""
        self.add(done=series)
        os.fsync(self._file.fileno())
        self._close(series)

    def _close(self, series: str) -> None:
        self.done[series] = self.done.get(series, 0) + len(self.objects.pop(series, ()))


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of a folder, for one process at a time.

    Raises:
        DataError: another process has it, or it cannot be written.
    """
    path = folder / JOURNAL
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb", buffering=0)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{folder}: another pull is writing there") from None
        if (content := path.read_bytes()) and not content.endswith(b"\n"):
            file.write(b"\n")  # after a torn line
        yield Journal(file, folder)


def objects(folder: Path) -> Iterator[Line]:
    """Every object that was pulled into a folder, once; as unreadable only if it never could be read."""
    seen: set[str] = set()
    unreadable: dict[str, Line] = {}
    for line in _lines(folder):
        if not (name := line.get("object")) or name in seen:
            continue
        if line.get("unreadable"):
            unreadable[name] = line
            continue
        seen.add(name)
        unreadable.pop(name, None)
        yield line
    yield from unreadable.values()


def incomplete(folder: Path) -> set[str]:
    """Series, keyed, that are not on disk as the archive has them: broken off, or with objects that cannot be read."""
    begun: set[str] = set()
    for line in _lines(folder):
        if "done" in line:
            begun.discard(line["done"])
        elif series := line.get("series"):
            begun.add(series)
    return begun | {line["series"] for line in objects(folder) if line.get("unreadable")}


def write_table(folder: Path) -> None:
    """Write `pulled.csv` anew: a row for every object that is among the images, also where a person moved it there."""
    replace_table(folder / TABLE, COLUMNS, (line for line in objects(folder) if is_image(line, folder)))


def is_image(line: Line, folder: Path) -> bool:
    """Whether an object is among the images now."""
    return bool(line.get("image")) and (folder / line["image"]).exists()


def _lines(folder: Path) -> Iterator[Line]:
    with (folder / JOURNAL).open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # torn by a kill
                continue
            if isinstance(line, dict):
                yield line
