"""What a data protection officer asks of a site's records: are they whole, and what do they amount to?

Everything is computed again from the stored events. Nothing is written, and no secret key is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedmed.errors import LedgerUnusable
from fedmed.privacy.accounting import Spent
from fedmed.privacy.audit_log import audit_log
from fedmed.privacy.balance import Balance, known_cohorts, written_events
from fedmed.privacy.chain import Anchor, Record, faults, is_signed, read
from fedmed.privacy.chain_file import ChainFile
from fedmed.privacy.egress import egress_manifest
from fedmed.privacy.ledger import CHAIN, DATABASE
from fedmed.privacy.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a site's records say, and what is wrong with them."""

    records: tuple[Record, ...]  # of the ledger
    audit: tuple[Record, ...]
    egress: tuple[Record, ...]
    balance: Balance
    spent: Spent  # of the patient who has spent most
    faults: tuple[str, ...]  # empty = whole, as far as the anchors reach
    warnings: tuple[str, ...]  # what is odd and harmless

    @property
    def head(self) -> Anchor | None:
        """The newest record of the ledger."""
        return self.records[-1].anchor if self.records else None


def examine(folder: Path, public: bytes, *, anchors: Sequence[Anchor] = (), witnesses: Sequence[Path] = ()) -> Findings:
    """Read and check a site's ledger, audit log and egress manifest.

    Args:
        folder: of the site's records, with `ledger/`, `audit.jsonl` and `egress.jsonl`.
        public: the site's public key, from `site.pub`: from a safe place if the site is doubted.
        anchors: heads that were kept elsewhere: of updates, or of earlier exports.
        witnesses: files of the ledger's witness, besides the one beside it; one that is missing is a fault.

    Raises:
        LedgerUnusable: there is no ledger, or it cannot be read at all.
    """
    found: list[str] = []
    with Storage(folder / "ledger" / DATABASE).reading() as rows:
        found += [f"ledger: SQLite says: {line}" for line in rows.damage()]
        records = list(_readable(rows.lines(), found))
        balance = Balance()
        try:
            balance.know(known_cohorts(rows.cohorts()))
        except LedgerUnusable as error:
            found.append(f"ledger: {error}")
    found += [f"witness: {path} is missing" for path in witnesses if not path.exists()]
    found += _chain_faults(CHAIN, records, public)
    for record in records:
        try:
            balance.apply(record.anchor.sequence, record.body)
        except LedgerUnusable as error:
            found.append(f"ledger: {error}")
    unknown = {charge.cohort for charge in balance.charges.values()} - set(balance.cohorts) - {"everyone"}
    found += [
        f"ledger: the members of a cohort are missing; it is charged to everyone ({name[:12]}…)" for name in unknown
    ]
    logs = {log.chain: _log(log, public, found) for log in (audit_log(folder), egress_manifest(folder))}
    departed = [_anchor_in(record.body["ledger"]) for record in logs["egress"] if "ledger" in record.body]
    witnessed = [
        record.anchor
        for path in (folder / "ledger" / "witness.jsonl", *witnesses)
        for record in _log(ChainFile(path=path, chain=CHAIN), public, found)[-1:]
    ]
    found += _against(records, [*anchors, *departed[-1:], *witnessed])
    return Findings(
        records=tuple(records),
        audit=tuple(logs["audit"]),
        egress=tuple(logs["egress"]),
        balance=balance,
        spent=balance.spent(),
        faults=tuple(dict.fromkeys(found)),
        warnings=(
            *_clock("ledger", records),
            *(each for name, log in logs.items() for each in _clock(f"{name}.jsonl", log)),
        ),
    )


def heads_in(path: Path, public: bytes) -> list[Anchor]:
    """The heads of a site's ledger that a server kept: those in a run's `events.jsonl` that the site signed.

    Args:
        path: of the file; lines about anything else, and about other sites, are left out.
        public: the site's key.

    Raises:
        LedgerUnusable: the file cannot be read, or holds no head of this site.
    """
    found: list[Anchor] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("ledger"), dict):
                head = event["ledger"]
                found.append(Anchor(sequence=int(head["sequence"]), hash=head["hash"], signature=head["signature"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"the file of heads cannot be read ({type(error).__name__})"
        raise LedgerUnusable(problem, rule="ledger.heads") from None
    own = [anchor for anchor in found if is_signed(CHAIN, anchor, public)]
    if not own:
        raise LedgerUnusable("the file of heads holds none that this site signed", rule="ledger.heads")
    return own


def exported(findings: Findings, public: bytes) -> dict[str, Any]:
    """All records as one JSON value that can be checked elsewhere. It holds no digest of a patient."""
    head = findings.head
    return {
        "schema": 1,
        "public_key": public.hex(),
        "anchor": asdict(head) if head else None,
        "delta": findings.balance.delta,
        "spent": asdict(findings.spent),
        "worst_patient": written_events(findings.balance.worst()) if findings.balance.charges else [],
        "faults": list(findings.faults),
        "warnings": list(findings.warnings),
        "ledger": [_plain(record) for record in findings.records],
        "audit": [_plain(record) for record in findings.audit],
        "egress": [_plain(record) for record in findings.egress],
    }


def _plain(record: Record) -> dict[str, Any]:
    return {"previous": record.previous, "body": dict(record.body), **asdict(record.anchor)}


def _readable(lines: Sequence[str], found: list[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        try:
            yield read(line)
        except LedgerUnusable:
            found.append(f"ledger: row {number} is no record")


def _log(log: ChainFile, public: bytes, found: list[str]) -> list[Record]:
    try:
        records = log.records()
    except LedgerUnusable as error:
        found.append(f"{log.path.name}: {error}")
        return []
    found += _chain_faults(log.chain, records, public, name=log.path.name)
    return records


def _chain_faults(chain: str, records: Sequence[Record], public: bytes, *, name: str = "ledger") -> list[str]:
    found = [f"{name}: record {place} {fault}" for place, fault in faults(chain, records)]
    unsigned = [record.anchor.sequence for record in records if not is_signed(chain, record.anchor, public)]
    return found + [f"{name}: record {place} is not signed with this site's key" for place in unsigned[:5]]


def _clock(name: str, records: Sequence[Record]) -> list[str]:
    back = [late.anchor.sequence for early, late in pairwise(records) if _time(late) < _time(early)]
    return [f"{name}: the clock went back before record {place} (nothing is spent by time)" for place in back[:5]]


def _time(record: Record) -> str:
    return str(record.body.get("time", ""))


def _against(records: Sequence[Record], anchors: Sequence[Anchor]) -> list[str]:
    """What anchors that were kept elsewhere say of the chain."""
    hashes = {record.anchor.sequence: record.anchor.hash for record in records}
    found = []
    for anchor in anchors:
        if anchor.sequence > len(records):
            missing = anchor.sequence - len(records)
            found.append(f"ledger: {missing} records are missing at its end: an anchor names record {anchor.sequence}")
        elif anchor.sequence and hashes.get(anchor.sequence) != anchor.hash:
            found.append(f"ledger: record {anchor.sequence} is another one than an anchor names")
    return found


def _anchor_in(value: Mapping[str, Any]) -> Anchor:
    return Anchor(sequence=int(value["sequence"]), hash=str(value["hash"]), signature="")
