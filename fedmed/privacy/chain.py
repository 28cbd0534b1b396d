"""Signed records, each holding the hash of the one before: what an edit, a deletion or a new order breaks.

A chain finds no truncation by itself: a shorter chain is whole as well. That takes an *anchor*, a record's number, hash
and signature that is kept elsewhere. Three chains are kept at a site: its ledger, its audit log, its egress manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedmed.errors import LedgerUnusable
from fedmed.privacy.keys import SiteKeys, signed_by

NOTHING = "0" * 64  # the hash before the first record


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Names one record of a chain, and with it all before it."""

    sequence: int  # 1-based; 0 = the empty chain
    hash: str  # SHA-256, hexadecimal
    signature: str  # Ed25519 by the site over chain, sequence and hash, hexadecimal


EMPTY = Anchor(sequence=0, hash=NOTHING, signature="")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One link of a chain."""

    chain: str  # which chain: a record of one is none of another
    previous: str  # hash of the record before
    body: Mapping[str, Any]
    anchor: Anchor

    @property
    def line(self) -> str:
        """One line of JSON without spaces, keys sorted: what is stored, and what a witness keeps."""
        facts = {"chain": self.chain, "previous": self.previous, "body": self.body, **vars(self.anchor)}
        return canonical(facts)


def canonical(value: Any) -> str:
    """The one JSON text of a value, over which hashes are taken. NaN is an error."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def appended(chain: str, head: Anchor, body: Mapping[str, Any], keys: SiteKeys) -> Record:
    """The record that follows a head."""
    sequence = head.sequence + 1
    digest = _hash(chain, sequence, head.hash, body)
    anchor = Anchor(sequence=sequence, hash=digest, signature=keys.sign(_signed(chain, sequence, digest)).hex())
    return Record(chain=chain, previous=head.hash, body=body, anchor=anchor)


def read(line: str) -> Record:
    """The inverse of `Record.line`.

    Raises:
        LedgerUnusable: it is no record.
    """
    try:
        facts = json.loads(line)
        anchor = Anchor(sequence=int(facts["sequence"]), hash=str(facts["hash"]), signature=str(facts["signature"]))
        return Record(
            chain=str(facts["chain"]), previous=str(facts["previous"]), body=dict(facts["body"]), anchor=anchor
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LedgerUnusable("a line is no record", rule="chain.unreadable") from None


def faults(chain: str, records: Iterable[Record], *, after: Anchor = EMPTY) -> Iterator[tuple[int, str]]:
    """(place, what is wrong) of every link that does not hold; signatures are not looked at.

    Args:
        chain: of which all must be.
        records: in the order in which they are stored.
        after: what the first one must follow.
    """
    head = after
    for record in records:
        place = head.sequence + 1
        if record.chain != chain:
            yield place, f"a record of another chain ({record.chain[:20]})"
        if record.anchor.sequence != place:
            yield place, f"found record {record.anchor.sequence}: records are missing or out of order"
        elif record.previous != head.hash:
            yield place, "does not follow the record before it"
        if record.anchor.hash != _hash(record.chain, record.anchor.sequence, record.previous, record.body):
            yield place, "was edited: its content does not have its hash"
        head = record.anchor


def is_signed(chain: str, anchor: Anchor, public: bytes) -> bool:
    """Whether the site signed this anchor of that chain."""
    try:
        signature = bytes.fromhex(anchor.signature)
    except ValueError:
        return False
    return signed_by(public, _signed(chain, anchor.sequence, anchor.hash), signature)


def _hash(chain: str, sequence: int, previous: str, body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical([chain, sequence, previous, body]).encode()).hexdigest()


def _signed(chain: str, sequence: int, digest: str) -> bytes:
    return f"fedmed {chain} {sequence} {digest}".encode()
