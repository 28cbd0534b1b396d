"""`fedmed ledger`: what a hospital's patients have spent, for its data protection officer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedmed.privacy.verification import Findings

app = typer.Typer(
    help="Read, check and export what a site recorded: budget, decisions, what left.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(metavar="SITE", help="a hospital's folder, or RUN/sites/NAME of a simulation")]
Public = Annotated[Path | None, typer.Option(metavar="FILE", help="the public key, if not the site's own site.pub")]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON, for a program")]

PROMISED = (
    'By server: it promised to add this noise (privacy.mode = "central"). This site cannot check that, and the '
    "server itself\nsaw every change without it. A patient may turn a change of the hospital into another one, so each "
    "counts as two."
)


@app.callback()
def ledger() -> None:
    """Read a site's records. Nothing here writes to them."""


@app.command("show")
def show(site: Folder, public: Public = None, as_json: AsJson = False) -> None:
    """Show what the patient who has spent most has spent, and every reservation behind it.

    Example: fedmed ledger show runs/first/sites/site-1
    """
    from fedmed.privacy.verification import exported

    found, key = _examined(site, public, [], [])
    if as_json:
        facts = exported(found, key)
        print(
            json.dumps(
                {name: facts[name] for name in ("delta", "spent", "worst_patient", "anchor", "faults", "warnings")}
            )
        )
        return
    _show(found)


@app.command("verify")
def verify(
    site: Folder,
    public: Public = None,
    anchors: Annotated[
        list[str], typer.Option("--anchor", metavar="NUMBER:HASH", help="a ledger's head that was kept elsewhere")
    ] = [],  # noqa: B006  # typer wants a list
    witnesses: Annotated[
        list[Path],
        typer.Option("--witness", metavar="FILE", help="a witness's file, besides the site's own"),
    ] = [],  # noqa: B006  # typer wants a list
    heads: Annotated[
        list[Path], typer.Option("--heads", metavar="FILE", help="events.jsonl of a run, from the coordinator")
    ] = [],  # noqa: B006  # typer wants a list
    as_json: AsJson = False,
) -> None:
    """Check every hash and signature, compare with all anchors, and compute ε again from the events.

    Exit status 1 if anything is wrong.

    Example: fedmed ledger verify runs/first/sites/site-1 --heads runs/first/events.jsonl
    """
    from fedmed.errors import LedgerUnusable

    found, _ = _examined(site, public, anchors, witnesses, heads)
    count = {"ledger": len(found.records), "audit": len(found.audit), "egress": len(found.egress)}
    if as_json:
        told = {"faults": list(found.faults), "warnings": list(found.warnings)}
        print(json.dumps({"records": count, "spent": vars(found.spent), **told}))
    else:
        print(", ".join(f"{name}: {number} records" for name, number in count.items()))
        print(_spent(found))
        for fault in found.faults:
            print(f"FAULT  {fault}")
        for warning in found.warnings:
            print(f"warning: {warning}")
    if found.faults:
        raise LedgerUnusable(
            f"{len(found.faults)} faults; do not train here until they are explained", rule="ledger.faults"
        )
    if not as_json:
        print("whole: no edit, deletion, reordering or truncation up to the newest anchor")


@app.command("export")
def export(
    site: Folder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="the file to write")],
    public: Public = None,
) -> None:
    """Write ledger, audit log and egress manifest with all signatures as one JSON file. It names no patient.

    Example: fedmed ledger export runs/first/sites/site-1 --out site-1.json
    """
    from fedmed.errors import DataError
    from fedmed.privacy.verification import exported

    if out.exists():
        raise DataError(f"{out} exists; choose a new name, so that nothing is overwritten")
    found, key = _examined(site, public, [], [])
    out.write_text(json.dumps(exported(found, key), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {out}: {len(found.records)} records of the ledger, {len(found.faults)} faults")


def _examined(
    site: Path, public: Path | None, anchors: Sequence[str], witnesses: Sequence[Path], heads: Sequence[Path] = ()
) -> tuple[Findings, bytes]:
    from fedmed.deployment.records import records_at
    from fedmed.privacy.keys import read_public
    from fedmed.privacy.verification import heads_in

    records = records_at(site)
    key = read_public(public) if public else records.key()
    kept = [anchor for path in heads for anchor in heads_in(path, key)]
    return records.examine(key, anchors=[*map(_anchor, anchors), *kept], witnesses=witnesses), key


def _anchor(text: str) -> Any:
    from fedmed.errors import ConfigError
    from fedmed.privacy.chain import Anchor

    number, _, digest = text.partition(":")
    if not number.isdecimal() or len(digest) != 64:
        raise ConfigError(f"--anchor {text}: expected NUMBER:HASH, the hash in 64 hexadecimal digits")
    return Anchor(sequence=int(number), hash=digest.lower(), signature="")


def _spent(found: Findings) -> str:
    from fedmed.types import rounded_up  # numpy

    spent, delta = found.spent, found.balance.delta
    if not found.balance.charges:
        return f"nothing is spent: no release under differential privacy (δ = {delta:g})"
    shown, by_filter = (rounded_up(each, 3) for each in (spent.epsilon, spent.epsilon_rdp))
    bound = f"; {by_filter} by the bound that decides (rdp)" if spent.epsilon < spent.epsilon_rdp else ""
    return f"the patient who has spent most: ε = {shown} at δ = {delta:g} ({spent.accountant}){bound}"


def _show(found: Findings) -> None:
    from rich.table import Table

    from fedmed.cli.display import console
    from fedmed.errors import one_line
    from fedmed.privacy.refusals import delta_warning

    print(_spent(found))
    print(
        "Counted: add or remove one patient with all images, over all runs recorded here. A patient who is also at "
        "another\nhospital spends there as well; the two add up."
    )
    patients = [
        found.balance.cohorts[c.cohort].patients
        for c in found.balance.charges.values()
        if c.cohort in found.balance.cohorts
    ]
    if warning := delta_warning(found.balance.delta, min(patients, default=0)):
        print(f"warning: {warning}")
    if found.balance.charges:
        table = Table(
            "run", "round", "what", "noise σ", "rate", "steps", "patients", "settled", box=None, pad_edge=False
        )
        for charge in found.balance.charges.values():
            cohort = found.balance.cohorts.get(charge.cohort)
            who = str(cohort.patients) if cohort else "all"
            for event in charge.events:
                settled = "yes" if charge.settled else "no: in full"
                what = f"{event.release} by server" if event.unit == "site" else event.release
                row = (what, f"{event.noise_multiplier:g}", f"{event.sample_rate:g}", str(event.steps))
                table.add_row(charge.run, str(charge.round), *row, who, settled)
        console().print(table)
        if any(event.unit == "site" for charge in found.balance.charges.values() for event in charge.events):
            print(PROMISED)
    refused = [record.body for record in found.audit if not record.body.get("allowed", True)]
    print(f"{len(found.audit)} decisions, {len(refused)} of them refusals; {len(found.egress)} replies left the site")
    for body in refused[-5:]:
        print("  " + one_line(f"refused: {body['task']}, round {body['round']} of {body['run']}: {body['reason']}"))
    head = found.head
    if head:
        print(f"anchor to keep elsewhere: {head.sequence}:{head.hash}")
    if found.faults:
        print(f"{len(found.faults)} FAULTS; see fedmed ledger verify")
