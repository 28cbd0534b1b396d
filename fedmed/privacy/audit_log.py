"""What a site decided: every request of a run and the answer, in a chained and signed log beside the ledger.

A refusal is kept as well as a permission, and so is the policy's digest: an edit of the policy shows between two lines.
"""

from __future__ import annotations

from pathlib import Path

from fedmed.privacy.chain import Record
from fedmed.privacy.chain_file import ChainFile
from fedmed.privacy.keys import SiteKeys
from fedmed.privacy.policy import Decision
from fedmed.types import now

AUDIT = "audit"


def audit_log(folder: Path) -> ChainFile:
    """The audit log of the site whose records lie in a folder."""
    return ChainFile(path=folder / "audit.jsonl", chain=AUDIT)


def keep_decision(
    folder: Path, keys: SiteKeys, decision: Decision, *, task: str, run: str, round: int, policy: str, settings: str
) -> Record:
    """Append a decision; it is on disk before anybody acts on it.

    Args:
        folder: of the site's records.
        keys: of the site.
        decision: what was answered.
        task: `card`, `train`, `evaluate` or `unmask`; or what an allowed one keeps back: `metrics`, `sum`.
        run: name of the run.
        round: of it.
        policy: SHA-256 of the policy that decided.
        settings: SHA-256 of the settings that the run sent.

    Raises:
        LedgerUnusable: the log cannot be written.
    """
    asked = {"task": task, "run": run, "round": round, "settings": settings}
    answer = {"allowed": decision.allowed, "rule": decision.rule, "reason": decision.reason, "policy": policy}
    return audit_log(folder).append({"kind": "decision", "time": now(), **asked, **answer}, keys)
