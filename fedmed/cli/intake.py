"""What `fedmed data import`, `check` and `card` and `fedmed server feasibility` do and print."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedmed.cli.display import bar, console
from fedmed.cli.pull import site_opt_out, site_pseudonyms
from fedmed.durable import sha256_of
from fedmed.errors import ConfigError, DataError, one_line
from fedmed.imaging.manifest import listed as listed_rows
from fedmed.intake.card import card_of, read_card, read_facts
from fedmed.intake.feasibility import table_of, warnings_of
from fedmed.intake.importing import MANIFEST, MASKS, UNMATCHED, Imported, Rules, Uncertain, import_images
from fedmed.intake.kinds import KINDS
from fedmed.intake.kinds.dicom import is_filled, take_in
from fedmed.intake.labels import NOT_USED, guessed_rules, read_label_rules, read_labels
from fedmed.intake.opt_out import listed, opted_out, remember, remembered
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.same_keys import note_keys
from fedmed.reporting.words import plural

OPT_OUT, LABELS, CHECKED = "opt-out.csv", "labels.toml", "check.json"
SIGNS = {"pass": "[green]pass[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}


def check_archive(kind: str, source: Path) -> None:
    """Before anything is made: whether there can be such an archive.

    Raises:
        FedmedError: no such kind, or no such folder.
    """
    if kind not in KINDS:
        raise ConfigError(f'"{kind}" is no kind of archive; there are {", ".join(KINDS)}')
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    if not any(path.is_file() for path in source.rglob("*")):
        raise DataError(f"{source}: holds no file")


def folders_of(kind: str, source: Path, out: Path) -> tuple[Path, ...]:
    """Where an import finds pseudonyms, if there are any: in its own folder, and in one that was pulled.

    Raises:
        DataError: the pull into the source has not ended.
    """
    return (out, source) if kind == "dicom" and source != out and is_filled(source) else (out,)


def import_data(
    kind: str,
    source: Path,
    out: Path,
    pseudonyms: Pseudonyms,
    *,
    table: Path | None,
    labels: Path | None,
    opt_out: Path | None,
    standing: Path | None = None,
    uncertain: Uncertain,
    check: str = "",
) -> bool:
    """Import an archive, and say what became of it; False if labels.toml was written instead, for a person to read.

    Args:
        kind: of the archive.
        source: its folder.
        out: where the manifest goes.
        pseudonyms: of the site.
        table: the hospital's own labels.
        labels: what the table means.
        opt_out: patients who withdrew, each of whom is told to be here or not.
        standing: the list that site.toml names; whoever is on either is left out.
        uncertain: what uncertain labels become.
        check: options that `fedmed data check` needs after this import.

    Raises:
        FedmedError: a file is missing or wrong.
    """
    if labels is not None and table is None:
        raise ConfigError("--labels says what a table means; name the table with --table")
    out.mkdir(parents=True, exist_ok=True)
    known = None
    if table is not None:
        path = labels or out / LABELS
        if labels is None and not path.exists():
            _guess(kind, table, path)
            return False
        known = read_labels(table, read_label_rules(path), pseudonyms)
    named, filled = source, kind == "dicom" and is_filled(source)
    note_keys(pseudonyms, out, source if filled else None)
    withdrawn, rows = remembered(out / OPT_OUT), {}
    if filled and (opt_out is None or opt_out.resolve() != (source / OPT_OUT).resolve()):
        withdrawn |= remembered(source / OPT_OUT)
    own = (out / OPT_OUT).resolve()  # pseudonyms already, of which no others are made
    lists = [path for path in (opt_out, standing) if path is not None and path.resolve() != own]
    if standing in lists:
        withdrawn |= opted_out(standing, pseudonyms)
    if opt_out in lists:
        rows = listed(opt_out, pseudonyms)
        withdrawn = withdrawn.union(*rows.values())
    if lists:
        remember(withdrawn, out / OPT_OUT)
    left_out: set[str] = set()
    if kind == "dicom" and not filled:
        with bar("de-identifying") as progress:
            left_out = take_in(source, out, pseudonyms, progress, withdrawn=withdrawn)
        source = out
    rules = Rules(pseudonyms=pseudonyms, table=known, withdrawn=withdrawn, listed=rows, uncertain=uncertain)
    report = import_images(kind, source, out, rules, frozenset(left_out), named=named)
    _say(report, rules, out)
    print(f"wrote {out / MANIFEST}; next: fedmed data check {quote(str(out))}{check}")
    return True


def _guess(kind: str, table: Path, path: Path) -> None:
    """A labels.toml, readable by its owner alone: it holds words of the hospital's table."""
    text = guessed_rules(table, by_name=kind == "pairs")
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
    guess = tomllib.loads(text)
    print(
        f"wrote {path}, a first guess at what the table means; correct it, then run this again: nothing is imported yet"
    )
    by = f"rows belong to images by {guess['join']}" if guess["column"] else "no column looks like a key, so name one"
    left = "; columns not used: see its last line" if NOT_USED in text else ""
    print(f"guessed: {by}; labels: {len(guess.get('labels', ()))}{left}")


def _say(report: Imported, rules: Rules, out: Path) -> None:
    table, absent = rules.table, report.absent(rules)
    masks = f", {plural(report.masks, 'mask')}" if report.masks else ""
    print(f"{plural(len(report.patients), 'patient')}, {plural(report.images, 'image')}{masks}")
    if report.renumbered:
        anew = f"{plural(report.renumbered, 'mask')} written anew into {out / MASKS}"
        print(f"{anew}: enhancing tumour is 3 there, as since 2023")
    for what, count in report.unmatched.most_common():
        print(f"left out: {count} × {what}", file=sys.stderr)
    if report.unmatched or absent or (table is not None and table.conflicts):
        print(f"which ones: {out / UNMATCHED}", file=sys.stderr)
    if rules.listed:
        print(f"{len(rules.listed) - len(absent)} of {len(rules.listed)} on the opt-out list are here", file=sys.stderr)
    if report.withdrawn:
        print(f"left out: {plural(len(report.withdrawn), 'patient')} who withdrew", file=sys.stderr)
    if report.renamed:
        text = "the row of the table names another patient than the header; the table is believed"
        print(f"read labels.toml again: {plural(report.renamed, 'image')} of which {text}", file=sys.stderr)
    if table is not None and table.conflicts:
        print(f"unknown: {plural(table.conflicts, 'label')} of which two rows say the opposite", file=sys.stderr)
    for name, count in table.strange.most_common() if table is not None else ():
        cells = f'{plural(count, "cell")} of "{name}"'
        print(f"unknown: {cells} with words that labels.toml does not list", file=sys.stderr)


def check_data(
    place: Path,
    *,
    labels: Sequence[str],
    html: Path | None,
    as_json: bool,
    preset: str = "",
    withdrawn: frozenset[str] = frozenset(),
) -> bool:
    """Check a data set, show the page, and keep the facts beside the manifest; whether a training would be right.

    Raises:
        DataError: the manifest cannot be read, or the facts cannot be kept.
        ConfigError: the preset is unknown.
    """
    from fedmed.intake.check import check  # heavy
    from fedmed.reporting.data_check import write_check

    manifest = _manifest(place)
    if html is not None and not html.parent.is_dir():
        raise ConfigError(f"--html: there is no folder {html.parent}")
    with bar("looking") as shown:
        told = None if shown is None else lambda _, done, of: shown(done, of)
        facts = check(manifest, labels=labels, preset=preset, withdrawn=withdrawn, progress=told)
    if html is not None:
        write_check(facts, html)
    del facts["pictures"]
    kept = manifest.with_name(CHECKED)
    kept.touch(mode=0o600)
    kept.write_text(json.dumps(facts, allow_nan=False), encoding="utf-8")
    if as_json:
        print(json.dumps(facts, allow_nan=False))
    else:
        _print(facts)
    return bool(facts["state"] != "fail")


def _print(facts: dict[str, Any]) -> None:
    out = console()
    out.print(", ".join(plural(facts[f"{what}s"], what) for what in ("patient", "row", "image")))
    if facts["labels"]:
        table = Table("label", "positive", "negative", "unknown", "positive, of those known", box=None, pad_edge=False)
        for name, each in facts["labels"].items():
            known = each["positive"] + each["negative"]
            share = f"{100 * each['positive'] / known:.1f} %" if known else "–"
            table.add_row(escape(name), *(str(each[key]) for key in ("positive", "negative", "unknown")), share)
        out.print(table)
    for what, values in facts["counts"].items():
        told = ", ".join(f"{value} {count}" for value, count in list(values.items())[:8])
        out.print(f"{what}: {told}{', …' if len(values) > 8 else ''}", markup=False, soft_wrap=True)
    for name, histogram in facts["histograms"].items():
        low, high = histogram["range"]
        out.print(f"{name}: {low:g} to {high:g}", markup=False, soft_wrap=True)
    for finding in facts["findings"]:
        rows = finding["rows"]
        where = f" ({listed_rows(rows)})" if rows else ""
        do = f" → {finding['do']}" if finding["do"] else ""
        out.print(
            f"{SIGNS[finding['state']]}  {escape(finding['what'] + ': ' + finding['said'] + where + do)}",
            soft_wrap=True,
        )
    words = {
        "pass": "passed: ready to train",
        "warn": "passed, with warnings to read: ready to train",
        "fail": "not ready to train",
    }
    out.print(f"{SIGNS[facts['state']]}  {words[facts['state']]}")


def write_card(place: Path, out: Path, withdrawn: frozenset[str] | None = None) -> None:
    """Write the card of a data set that was checked.

    Args:
        place: the manifest, or its folder.
        out: the card.
        withdrawn: whatever patients who withdrew may be called, none of whom it may count; None = as at the check.

    Raises:
        DataError: it was not checked, or has changed since, or somebody has withdrawn since.
    """
    from fedmed.intake.check import who_withdrew  # heavy

    manifest = _manifest(place)
    digest = sha256_of(manifest)
    facts = read_facts(manifest.with_name(CHECKED), digest)
    if withdrawn is not None and facts.get("withdrawn") != who_withdrew(manifest, withdrawn):
        raise DataError(f"{place}: its check left out others than the opt-out list does now; check again with --site")
    card = card_of(facts)
    out.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if card.check == "fail":
        text = "the last check FAILED, and the card says so; mend, check again and write it anew"
        print(f"warning: {text}", file=sys.stderr)
    of = f"labels {', '.join(card.labels)}" if card.labels else "no label"
    print(f"wrote {out} ({of}); read it: it is all that leaves, and holds nothing of fewer than 10 patients")


def show_feasibility(paths: Sequence[Path], *, as_json: bool) -> None:
    """Show whether the sites behind some cards fit each other; a site is called as its file.

    Raises:
        DataError: a file is no card.
        ConfigError: two files have one name.
    """
    cards = {path.stem: read_card(path) for path in paths}
    if len(cards) < len(paths):
        raise ConfigError("two cards have the same file name; call each file as its site")
    lines, warnings = table_of(cards), warnings_of(cards)
    if as_json:
        sites = {name: card.model_dump(mode="json") for name, card in cards.items()}
        print(json.dumps({"sites": sites, "warnings": warnings}, allow_nan=False))
        return
    table = Table(*(escape(cell) for cell in lines[0]), box=None, pad_edge=False)
    for line in lines[1:]:
        table.add_row(*(escape(one_line(cell)) for cell in line))
    console().print(table)
    for warning in warnings:
        console().print(f"[yellow]warn[/]  {escape(one_line(warning))}", soft_wrap=True)
    if not warnings:
        console().print("[green]pass[/]  the sites fit each other")


def withdrawn_at(site: Path | None, place: Path) -> frozenset[str] | None:
    """Whatever a manifest may call those who withdrew, by the list that a site.toml names; None without a site.

    Raises:
        FedmedError: a file is missing or wrong, or other keys made the manifest's pseudonyms.
    """
    if site is None:
        return None
    pseudonyms = site_pseudonyms(site, None, _manifest(place).parent, make=False)
    path = site_opt_out(site)
    return opted_out(path, pseudonyms) if path else frozenset()


def _manifest(place: Path) -> Path:
    manifest = place / MANIFEST if place.is_dir() else place
    if not manifest.is_file():
        raise DataError(f"{manifest}: no such manifest; `fedmed data import` writes one")
    return manifest
