"""A chain as a file of one record a line: the audit log, the egress manifest, and what a witness keeps of a ledger."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.durable import append
from fedmed.errors import LedgerUnusable, plain_reason
from fedmed.privacy.chain import EMPTY, Anchor, Record, appended, faults, is_signed, read
from fedmed.privacy.keys import SiteKeys

TAIL_BYTES = 1 << 16  # read first when the last line is wanted


@dataclass(frozen=True, kw_only=True)
class ChainFile:
    """An append-only file.

    What a killed process left half written, a line without its end, was never said to anybody; the next append cuts it.
    """

    path: Path
    chain: str

    def append(self, body: Mapping[str, Any], keys: SiteKeys) -> Record:
        """Sign a new last record; it is on disk when this returns.

        Raises:
            LedgerUnusable: the file cannot be written, or its last record is not this site's.
        """
        with self.locked() as file:
            head = _last(file, self.chain)
            if head.sequence and not is_signed(self.chain, head, keys.public):
                raise LedgerUnusable(f"{self.path.name}: its last record is not this site's", rule="chain.signature")
            record = appended(self.chain, head, body, keys)
            _write(file, [record.line])
        return record

    def records(self) -> list[Record]:
        """All records, as they are stored; none if there is no file.

        Raises:
            LedgerUnusable: the file cannot be read, or a line is no record.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(error) from None
        return [read(line.decode(errors="replace")) for line in content[: content.rfind(b"\n") + 1].splitlines()]

    @contextmanager
    def locked(self) -> Iterator[int]:
        """The file, made if need be, and nobody else's for the moment.

        Raises:
            LedgerUnusable: it cannot be opened or written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> LedgerUnusable:
        reason = plain_reason(error)
        text = f"{self.path.name} cannot be read or written ({reason})"
        public = f"the site's records cannot be read or written: {reason}"
        return LedgerUnusable(text, rule="chain.unwritable", public=public)


class Witness(ChainFile):
    """A second copy of a ledger's records, without its cohorts: the newest anchor that the site itself can look at.

    A hospital names a file on another machine; without one it lies beside the ledger. It is written before the ledger
    is: what it holds and the ledger does not was reserved by a killed process, or lost by restoring an older copy.
    """

    def newer(self, file: int, head: Anchor, hash_at: Callable[[int], str]) -> list[Record]:
        """What the witness holds beyond a head of the ledger.

        Args:
            file: from `locked`.
            head: of the ledger.
            hash_at: the hash of a record of the ledger, by its number up to the head's.

        Raises:
            LedgerUnusable: it is the witness of another history, or damaged.
        """
        last = _last(file, self.chain)
        if last.sequence <= head.sequence:
            if hash_at(last.sequence) != last.hash:
                raise forked()
            return []
        records = self.records()
        if any(faults(self.chain, records)):
            raise LedgerUnusable("the witness is damaged; restore it, or name a new one", rule="witness.damaged")
        if head.sequence and records[head.sequence - 1].anchor.hash != head.hash:
            raise forked()
        return records[head.sequence :]

    def reached(self, file: int) -> int:
        """The number of its last record."""
        return _last(file, self.chain).sequence

    def extend(self, file: int, records: Sequence[Record]) -> None:
        """Add records that follow the last one; they are on disk when this returns.

        Raises:
            LedgerUnusable: they do not follow it.
        """
        last = _last(file, self.chain)
        if any(faults(self.chain, records, after=last)):
            raise forked()
        _write(file, [record.line for record in records])


def witness_path(folder: Path, public: bytes, named: str) -> Path:
    """Where the witness writes: in the folder that the policy names, or beside the ledger."""
    return Path(named) / f"witness-{public.hex()[:16]}.jsonl" if named else folder / "witness.jsonl"


def forked() -> LedgerUnusable:
    """The error of two histories that both went on from one copy."""
    text = (
        "the ledger and its witness tell two histories: a copy of the ledger was used elsewhere. "
        "Nothing is trained until the right one is restored"
    )
    return LedgerUnusable(text, rule="ledger.forked", public="the site's ledger was copied and used twice")


def _last(file: int, chain: str) -> Anchor:
    """The last record's anchor. A half-written last line is cut off; only who holds the lock may ask."""
    size = os.fstat(file).st_size
    reach, content = min(size, TAIL_BYTES), b""
    while size:
        content = os.pread(file, reach, size - reach)
        end = content.rfind(b"\n")
        start = content.rfind(b"\n", 0, max(end, 0))
        if start >= 0 or reach == size:
            break
        reach = min(size, 2 * reach)
    end = content.rfind(b"\n")
    if size and end != len(content) - 1:
        os.ftruncate(file, size - reach + end + 1)
        content = content[: end + 1]
    if not content:
        return EMPTY
    record = read(content[:-1].rpartition(b"\n")[2].decode(errors="replace"))
    if record.chain != chain or any(faults(chain, [record], after=_before(record))):
        raise LedgerUnusable("the last record of a chain was edited", rule="chain.damaged")
    return record.anchor


def _before(record: Record) -> Anchor:
    return Anchor(sequence=record.anchor.sequence - 1, hash=record.previous, signature="")


def _write(file: int, lines: Sequence[str]) -> None:
    append(file, "".join(f"{line}\n" for line in lines).encode())
