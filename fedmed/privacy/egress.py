"""What left a site: one signed line for each reply to a task, with names, sizes and counts, and never a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedmed.privacy.chain import Anchor, Record
from fedmed.privacy.chain_file import ChainFile
from fedmed.privacy.keys import SiteKeys
from fedmed.types import Scalar, Update, now

EGRESS = "egress"
HEAD = ("ledger-sequence", "ledger-hash", "ledger-signature")  # facts of an update: the ledger's newest anchor


@dataclass(frozen=True, kw_only=True)
class Departure:
    """The circumstances under which an update leaves."""

    task: str
    run: str
    round: int
    rule: str  # what allowed it
    controls: Sequence[str]  # technical controls that were applied, in words
    epsilon_before: float
    epsilon_after: float
    delta: float
    ledger: Anchor
    policy: str  # SHA-256 of the policy
    code: str  # hash of the installed fedmed
    settings: str  # SHA-256 of the settings that the run sent


def egress_manifest(folder: Path) -> ChainFile:
    """The egress manifest of the site whose records lie in a folder."""
    return ChainFile(path=folder / "egress.jsonl", chain=EGRESS)


def keep_departure(folder: Path, keys: SiteKeys, update: Update, departure: Departure) -> Record:
    """Append what is about to leave; it is on disk before it does.

    Raises:
        LedgerUnusable: the manifest cannot be written.
    """
    facts = {name: value for name, value in asdict(departure).items() if name != "ledger"}
    ledger = {"sequence": departure.ledger.sequence, "hash": departure.ledger.hash}
    body = {"kind": "departure", "time": now(), **facts, "controls": list(departure.controls), "ledger": ledger}
    return egress_manifest(folder).append({**body, "left": contents(update), "accountant": "rdp"}, keys)


def contents(update: Update) -> list[dict[str, Scalar]]:
    """Everything that an update holds, by name: how many values and how many bytes."""
    vectors: dict[str, NDArray[Any]] = {}
    if update.weights is not None:
        vectors |= {"parameters": update.weights.parameters, "buffers": update.weights.buffers}
    if update.masked is not None:
        vectors["masked"] = update.masked
    rows: list[dict[str, Scalar]] = [
        {"kind": "vector", "name": name, "values": int(vector.size), "bytes": int(vector.nbytes)}
        for name, vector in sorted(vectors.items())
    ]
    rows += [
        {"kind": "sums", "name": name, "values": int(values.size), "bytes": int(values.nbytes)}
        for name, values in sorted(update.metrics.items())
    ]
    given = {"num-examples": update.num_examples, **update.facts}
    return rows + [{"kind": "fact", "name": name, "values": 1, "bytes": 8} for name in sorted(given)]


def with_head(facts: Mapping[str, Scalar], head: Anchor) -> dict[str, Scalar]:
    """An update's facts with the ledger's newest anchor, which so is kept by another party."""
    return {**facts, **dict(zip(HEAD, (head.sequence, head.hash, head.signature), strict=True))}
