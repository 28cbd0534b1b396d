"""The index of a cache: one SQLite file, which keeps its promises under kill -9 and between processes."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "index.sqlite"
WAIT_S = 60.0  # for another process's commit
AT_ONCE = 500  # keys in one query
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS secret (only INTEGER PRIMARY KEY CHECK (only = 0), value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS files (place BLOB PRIMARY KEY, facts TEXT NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segments (name TEXT PRIMARY KEY, recipe TEXT NOT NULL, used REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, segment TEXT, image TEXT, mask TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (key BLOB PRIMARY KEY, reason TEXT NOT NULL, decoders TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_by_segment ON entries (segment);
COMMIT;
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an array lies in a segment."""

    lane: str  # "images.u1": which of the segment's files
    offset: int  # elements
    shape: tuple[int, ...]
    checksum: int  # CRC-32 of its bytes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is kept of one row."""

    segment: str
    image: Place
    mask: Place | None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What is known of a segment without opening it."""

    name: str
    recipe: str  # JSON of `Recipe.settings`
    used: float  # seconds since the epoch


class Index:
    """An open index. Every method is one transaction."""

    def __init__(self, folder: Path) -> None:
        """Open the index of a folder, and make it if there is none.

        Raises:
            sqlite3.Error: it cannot be opened, or is damaged.
        """
        self._rows = sqlite3.connect(folder / NAME, timeout=WAIT_S, isolation_level=None)
        try:
            self._rows.executescript(SCHEMA)
            self._rows.execute("INSERT OR IGNORE INTO secret VALUES (0, ?)", [secrets.token_bytes(32)])
            self.secret: bytes = self._rows.execute("SELECT value FROM secret").fetchone()[0]
        except BaseException:
            self._rows.close()
            raise

    def close(self) -> None:
        """Close it; what was committed stays."""
        self._rows.close()

    def digests(self, places: Sequence[bytes]) -> dict[bytes, tuple[str, bytes]]:
        """(facts, digest) of the files that were hashed before, by the hash of their path."""
        query = "SELECT place, facts, digest FROM files WHERE place IN ({})"
        return {place: (facts, digest) for place, facts, digest in self._select(query, places)}

    def add_digests(self, found: Iterable[tuple[bytes, str, bytes]]) -> None:
        """Keep (place, facts, digest) of files."""
        with self._transaction():
            self._rows.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", found)

    def entries(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """What is kept under these keys."""
        query = "SELECT key, segment, image, mask FROM entries WHERE key IN ({})"
        return {key: _entry(*row) for key, *row in self._select(query, keys)}

    def entries_in(self, segment: str) -> list[Entry]:
        """Everything that is kept in a segment."""
        query = "SELECT segment, image, mask FROM entries WHERE segment = ?"
        return [_entry(*row) for row in self._rows.execute(query, [segment])]

    def failures(self, keys: Sequence[bytes], decoders: str) -> dict[bytes, str]:
        """Why nothing is kept under these keys, where the same decoders tried before."""
        query = "SELECT key, reason, decoders FROM failures WHERE key IN ({})"
        return {key: reason for key, reason, tried in self._select(query, keys) if tried == decoders}

    def add(
        self,
        segment: str,
        recipe: str,
        entries: Mapping[bytes, Entry],
        failures: Mapping[bytes, str],
        decoders: str,
    ) -> None:
        """Commit rows, all or none; keys that another process has committed stay as they are."""
        with self._transaction():
            if entries:
                self._rows.execute("INSERT OR IGNORE INTO segments VALUES (?, ?, ?)", [segment, recipe, time.time()])
            self._rows.executemany(
                "INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?)",
                [
                    (key, entry.segment, _text(entry.image), _text(entry.mask) if entry.mask else None)
                    for key, entry in entries.items()
                ],
            )
            self._rows.executemany(
                "INSERT OR REPLACE INTO failures VALUES (?, ?, ?)",
                [(key, reason, decoders) for key, reason in failures.items()],
            )

    def move(self, segment: str, recipe: str, entries: Mapping[bytes, Entry]) -> None:
        """Say where these rows lie now, and forget the segments in which nothing is left."""
        with self._transaction():
            self._rows.execute("INSERT INTO segments VALUES (?, ?, ?)", [segment, recipe, time.time()])
            self._rows.executemany(
                "UPDATE entries SET segment = ?, image = ?, mask = ? WHERE key = ?",
                [
                    (entry.segment, _text(entry.image), _text(entry.mask) if entry.mask else None, key)
                    for key, entry in entries.items()
                ],
            )
            self._rows.execute("DELETE FROM segments WHERE name NOT IN (SELECT segment FROM entries)")

    def touch(self, segments: Iterable[str]) -> None:
        """Note that these are used now."""
        with self._transaction():
            now = time.time()
            self._rows.executemany("UPDATE segments SET used = ? WHERE name = ?", [(now, name) for name in segments])

    def forget(self, segment: str) -> None:
        """Speak of a segment no more."""
        with self._transaction():
            self._rows.execute("DELETE FROM entries WHERE segment = ?", [segment])
            self._rows.execute("DELETE FROM segments WHERE name = ?", [segment])

    def segments(self) -> list[Segment]:
        """All of them, the one that was used longest ago first."""
        found = self._rows.execute("SELECT name, recipe, used FROM segments ORDER BY used, name")
        return [Segment(name=name, recipe=recipe, used=used) for name, recipe, used in found]

    def rows_in(self) -> dict[str, int]:
        """How many rows are kept in each segment."""
        return dict(self._rows.execute("SELECT segment, count(*) FROM entries GROUP BY segment"))

    def _select(self, query: str, keys: Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            yield from self._rows.execute(query.format(",".join("?" * len(some))), some)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._rows.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._rows.in_transaction:
                self._rows.execute("ROLLBACK")
            raise
        self._rows.execute("COMMIT")


def _entry(segment: str, image: str, mask: str | None) -> Entry:
    return Entry(segment=segment, image=_place(image), mask=_place(mask) if mask else None)


def _text(place: Place) -> str:
    return json.dumps(asdict(place))


def _place(text: str) -> Place:
    facts = json.loads(text)
    return Place(**{**facts, "shape": tuple(facts["shape"])})
