"""What a pull has done so far: one line of JSON for every object, and one for every series that is complete.

Everything in it is keyed or harmless. `pulled.csv` and all counts are made from it, so they never contradict it.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedmed.durable import replacing
from fedmed.errors import DataError

JOURNAL, TABLE = ".journal.jsonl", "pulled.csv"
COLUMNS = ("patient_id", "study_uid", "series_uid", "image", "view", "age", "sex", "accession", "modality")

Line = dict[str, Any]


class Journal:
    """What was done already, by keyed UIDs, and a file to add to it."""

    def __init__(self, file: BinaryIO, lines: Iterator[Line]) -> None:
        """Take in what is there."""
        self._file = file
        self.done: set[str] = set()  # series
        self.objects: dict[str, set[str]] = defaultdict(set)  # of series that are not done
        for line in lines:
            if "done" in line:
                self.done.add(line["done"])
                self.objects.pop(line["done"], None)
            else:
                self.objects[line["series"]].add(line["object"])

    def add(self, **line: Any) -> None:
        """One line in one write: a kill leaves it whole or torn, and a torn one is passed over."""
        self._file.write(json.dumps(line).encode() + b"\n")

    def end(self, series: str) -> None:
        """A series is complete, and on disk."""
        self.add(done=series)
        os.fsync(self._file.fileno())
        self.done.add(series)
        self.objects.pop(series, None)


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
        yield Journal(file, _lines(folder))


def objects(folder: Path) -> Iterator[Line]:
    """Every object that was pulled into a folder, once."""
    seen: set[str] = set()
    for line in _lines(folder):
        if (name := line.get("object")) and name not in seen:
            seen.add(name)
            yield line


def write_table(folder: Path) -> None:
    """Write `pulled.csv` anew: a row for every object that is among the images, also where a person moved it there."""
    with (
        replacing(folder / TABLE, mode=0o600) as descriptor,
        os.fdopen(descriptor, "w", encoding="utf-8", newline="", closefd=False) as table,
    ):
        writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for line in objects(folder) if is_image(line, folder))


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
