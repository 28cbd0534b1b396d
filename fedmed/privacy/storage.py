"""The ledger's database: SQLite, two tables that only grow. It stores lines and bytes and understands neither."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmed.durable import make_private
from fedmed.errors import LedgerUnusable, plain_reason

VERSION = 1
WAIT_S = 30.0  # for another process's transaction
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS records (sequence INTEGER PRIMARY KEY, line TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cohorts (name TEXT PRIMARY KEY, members BLOB NOT NULL);
{
    "".join(
        f"CREATE TRIGGER IF NOT EXISTS {table}_{verb.lower()} BEFORE {verb} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;"
        for table in ("records", "cohorts")
        for verb in ("UPDATE", "DELETE")
    )
}
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Rows:
    """The tables within one transaction, which no other process changes meanwhile."""

    _connection: sqlite3.Connection

    def line(self, sequence: int) -> str | None:
        """One record."""
        row = self._connection.execute("SELECT line FROM records WHERE sequence = ?", (sequence,)).fetchone()
        return None if row is None else str(row[0])

    def lines(self, *, after: int = 0) -> list[str]:
        """Records in order, those up to a number left out."""
        query = "SELECT line FROM records WHERE sequence > ? ORDER BY sequence"
        return [str(line) for (line,) in self._connection.execute(query, (after,))]

    def append(self, first: int, lines: Sequence[str]) -> None:
        """Add records, numbered from `first` on."""
        self._connection.executemany("INSERT INTO records VALUES (?, ?)", enumerate(lines, start=first))

    def cohorts(self) -> dict[str, bytes]:
        """Every cohort's members, by name."""
        return {str(name): bytes(members) for name, members in self._connection.execute("SELECT * FROM cohorts")}

    def names(self) -> set[str]:
        """Of all cohorts."""
        return {str(name) for (name,) in self._connection.execute("SELECT name FROM cohorts")}

    def add_cohort(self, name: str, members: bytes) -> None:
        """Keep a cohort that is new."""
        self._connection.execute("INSERT OR IGNORE INTO cohorts VALUES (?, ?)", (name, members))

    def damage(self) -> list[str]:
        """What SQLite finds wrong with its own pages."""
        found = [str(line) for (line,) in self._connection.execute("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found


class Storage:
    """One database file. A connection is opened when it is needed, and again in a forked process."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet."""
        self.path = path
        self._connection: tuple[int, sqlite3.Connection] | None = None

    @contextmanager
    def writing(self) -> Iterator[Rows]:
        """A transaction that waits for those of other processes; it is on disk when this ends without an error.

        Raises:
            LedgerUnusable: the database cannot be written: full disk, read-only, damaged, or another process for 30 s.
        """
        try:
            connection = self._opened()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield Rows(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise unusable(error) from None

    @contextmanager
    def reading(self) -> Iterator[Rows]:
        """The tables as they are now, for who must not write: a data protection officer, on a copy perhaps.

        A connection of this process that is open already is used.

        Raises:
            LedgerUnusable: there is no ledger, or it cannot be read.
        """
        if not self.path.exists():
            raise LedgerUnusable(f"{self.path} does not exist: no ledger was opened there", rule="ledger.missing")
        if self._connection is not None and self._connection[0] == os.getpid():
            with self._looking(self._connection[1]) as rows:
                yield rows
            return
        beside = self.path.with_name(f"{self.path.name}-wal").exists()  # then what is newest lies there
        mode = "mode=ro" if beside or os.access(self.path.parent, os.W_OK) else "immutable=1"
        try:
            address = f"{self.path.absolute().as_uri()}?{mode}"
            connection = sqlite3.connect(address, uri=True, timeout=WAIT_S, isolation_level=None)
            with closing(connection), self._looking(connection) as rows:
                yield rows
        except (sqlite3.Error, OSError) as error:
            raise unusable(error) from None

    @staticmethod
    @contextmanager
    def _looking(connection: sqlite3.Connection) -> Iterator[Rows]:
        try:
            connection.execute("BEGIN")
            yield Rows(connection)
        except sqlite3.Error as error:
            raise unusable(error) from None
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        owner, self._connection = self._connection, None
        if owner is not None and owner[0] == os.getpid():
            owner[1].close()

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None and self._connection[0] == os.getpid():
            return self._connection[1]
        if not self.path.exists():
            make_private(self.path.parent)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
        self._connection = os.getpid(), connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk before it returns
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        elif version != VERSION:
            text = f"the ledger has format {version}; this fedmed reads {VERSION}. Use the version that wrote it"
            raise LedgerUnusable(text, rule="ledger.version")
        return connection


def unusable(error: Exception) -> LedgerUnusable:
    """What SQLite or the disk said, as the error of a ledger; neither holds a patient's value."""
    code = getattr(error, "sqlite_errorname", "")
    kinds = {
        "SQLITE_FULL": ("the disk is full", "ledger.disk-full"),
        "SQLITE_READONLY": ("it cannot be written", "ledger.read-only"),
        "SQLITE_CANTOPEN": ("it cannot be opened", "ledger.unreadable"),
        "SQLITE_BUSY": (f"another process has held it for {WAIT_S:g} s", "ledger.busy"),
        "SQLITE_CORRUPT": ("its file is damaged", "ledger.damaged"),
        "SQLITE_NOTADB": ("its file is damaged", "ledger.damaged"),
        "SQLITE_CONSTRAINT": ("it only grows", "ledger.append-only"),
    }
    for name, (reason, rule) in kinds.items():
        if code.startswith(name):
            text = f"the ledger cannot be used: {reason}; nothing is trained until it can"
            return LedgerUnusable(text, rule=rule, public=f"the site's ledger cannot be used: {reason}")
    reason = plain_reason(error) if isinstance(error, OSError) else code or type(error).__name__
    return LedgerUnusable(f"the ledger cannot be used ({reason}); nothing is trained until it can", rule="ledger.io")
