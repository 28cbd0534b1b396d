"""`fedmed data import`: an archive and a table of labels as a manifest, with the site's pseudonyms for its patients."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

from fedmed.durable import make_private, replacing
from fedmed.errors import DataError
from fedmed.imaging.manifest import cell_of
from fedmed.imaging.volumes.nifti import read_nifti, write_nifti
from fedmed.intake.kinds import KINDS
from fedmed.intake.kinds.found import UNCERTAIN, Found, Unmatched
from fedmed.intake.labels import LabelTable
from fedmed.intake.pseudonyms import Pseudonyms

MANIFEST, UNMATCHED, MASKS = "manifest.csv", "unmatched.csv", "masks"
SEVERAL = "image whose rows in the table name several patients"
MASKED = ("brats", "pairs")  # kinds that may have masks
Uncertain = Literal["ignore", "zeros", "ones"]
POLICIES: dict[Uncertain, str] = {"ignore": "", "zeros": "0", "ones": "1"}  # U-Ignore, U-Zeros and U-Ones of CheXpert


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How an archive is imported."""

    pseudonyms: Pseudonyms
    table: LabelTable | None = None
    withdrawn: frozenset[str] = frozenset()  # ids and pseudonyms of patients who opted out
    listed: Mapping[int, frozenset[str]] = field(default_factory=dict)  # the same by row of the list that says so
    uncertain: Uncertain = "ignore"  # what a label becomes of which CheXpert's labeler was not sure


@dataclass(kw_only=True)
class Imported:
    """What became of an archive, counted while it is read."""

    images: int = 0
    masks: int = 0
    renamed: int = 0  # images to which the table gives another patient than their own header
    renumbered: int = 0  # of them, those that were written anew into `MASKS`
    patients: set[str] = field(default_factory=set, repr=False)
    withdrawn: set[str] = field(default_factory=set, repr=False)  # patients who are there and opted out
    met: set[str] = field(default_factory=set, repr=False)  # of `Rules.withdrawn`, what was met
    unmatched: Counter[str] = field(default_factory=Counter)  # what -> how many; `UNMATCHED` says which

    def absent(self, rules: Rules) -> list[int]:
        """Rows of the opt-out list whose patient has no image here."""
        return [number for number, names in rules.listed.items() if not names & self.met]


def import_images(
    kind: str,
    source: Path,
    out: Path,
    rules: Rules,
    left_out: frozenset[str] = frozenset(),
    *,
    named: Path | None = None,
) -> Imported:
    """Write `out`/manifest.csv and `out`/unmatched.csv, each whole or not at all. Images stay where they are.

    Masks that number their classes otherwise than other years of their set are written anew into `out`/masks.

    An image is left out if nothing is known of it: no row in the table, no labels of its own and no mask. So it is if
    rows of the table name several patients for it. Where nothing can be imported, the former manifest stays, and
    `unmatched.csv` says what was left out and why.

    Args:
        kind: a key of `KINDS`.
        source: the archive.
        out: a folder; files of these names in it are replaced.
        rules: how.
        left_out: pseudonyms of patients who withdrew, and who were left out before.
        named: where the archive was taken from, if it is now elsewhere.

    Raises:
        DataError: the archive is none of this kind, or nothing of it can be imported.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = Imported(withdrawn=set(left_out), met=set(left_out))
    with ExitStack() as stack:
        misses = stack.enter_context(_whole(out / UNMATCHED))
        told = csv.writer(misses)
        told.writerow(["what", "where"])
        writer: csv.DictWriter[str] | None = None
        for each in _chosen(KINDS[kind](source), rules, report):
            if isinstance(each, Unmatched):
                report.unmatched[each.what] += 1
                told.writerow([each.what, each.place])
                continue
            if each.mask is not None and each.classes:
                each = replace(each, mask=_renumbered(each.mask, each.classes, out / MASKS, source))
                report.renumbered += 1
            row = _row(each, out, masked=each.masked or kind in MASKED)
            if writer is None:
                writer = csv.DictWriter(stack.enter_context(_whole(out / MANIFEST)), list(row))
                writer.writeheader()
            writer.writerow(row)
        told.writerows(
            ("no image of this patient", f"row {number} of the opt-out list") for number in report.absent(rules)
        )
        told.writerows(
            (f"another row says the opposite of {label}", f"row {number} of the table")
            for number, label in (rules.table.contradicting() if rules.table is not None else ())
        )
    if writer is None:
        hint = "; see join and column in labels.toml, zeros the table lost, and whether these are the pull's keys"
        why = f"{_listed(report)}{hint if rules.table else ''}; which ones: {out / UNMATCHED}"
        raise DataError(
            f"nothing of {named or source} can be imported: {why if report.unmatched else 'it holds no image'}"
        )
    return report


def _chosen(found: Iterator[Found | Unmatched], rules: Rules, report: Imported) -> Iterator[Found | Unmatched]:
    """What the manifest gets, under pseudonyms and with the table's labels, and what fits nothing."""
    for each in found:
        image = each.found if isinstance(each, Unmatched) else each
        if image is None:
            yield each
            continue
        told = rules.table.match(image) if rules.table is not None else {}  # a row of what was set apart has an image
        known = _labelled(image, rules, told or {})
        own = image.patient if image.pseudonymous else rules.pseudonyms.patient(image.patient)
        if met := {known.patient, own, image.patient} & rules.withdrawn:  # a table may call a patient otherwise
            report.withdrawn.add(known.patient)
            report.met |= met
        if isinstance(each, Unmatched):
            yield each
            continue
        if met:
            continue
        if rules.table is not None and rules.table.disputes(each):  # one of the several may have withdrawn
            yield Unmatched(what=SEVERAL, place=os.fspath(each.image))
            continue
        if told is None and not each.labels and each.mask is None:
            yield Unmatched(what="image without row", place=os.fspath(each.image))
            continue
        if rules.table is None and each.masked and each.mask is None:
            yield Unmatched(what="image without mask", place=os.fspath(each.image))
            continue
        report.images += 1
        report.masks += known.mask is not None
        report.patients.add(known.patient)
        report.renamed += image.pseudonymous and bool(image.patient) and image.patient != known.patient
        yield known
    for number in rules.table.unmatched() if rules.table is not None else ():
        yield Unmatched(what="row without image", place=f"row {number} of the table")
    for number in rules.table.disputing() if rules.table is not None else ():
        yield Unmatched(what="row whose key another row gives to another patient", place=f"row {number} of the table")
    for number in rules.table.blank if rules.table is not None else ():
        yield Unmatched(what="row without a key", place=f"row {number} of the table")


def _labelled(found: Found, rules: Rules, told: dict[str, str]) -> Found:
    """An image under its patient's pseudonym, with what the table says of it beside what its archive says."""
    patient, pseudonymous = told.get("patient_id", ""), found.pseudonymous
    patient, pseudonymous = (patient, False) if patient else (found.patient, pseudonymous)
    labels = {name: POLICIES[rules.uncertain] if text == UNCERTAIN else text for name, text in found.labels.items()}
    if rules.table is not None:
        labels |= {name: told.get(name, "") or labels.get(name, "") for name in rules.table.names}
    return replace(
        found,
        patient=patient if pseudonymous else rules.pseudonyms.patient(patient),
        labels=labels,
        view=told.get("view") or found.view,
        age=told.get("age") or found.age,
        sex=told.get("sex") or found.sex,
        split=told.get("split") or found.split,
        site=told.get("site") or found.site,
    )


def _row(found: Found, out: Path, *, masked: bool) -> dict[str, str]:
    """A row of the manifest; all rows of an archive have the same columns."""
    places = [None if image is None else Path(_relative(image, out)) for image in found.images]
    return {
        "patient_id": found.patient,
        "image": cell_of(places),
        **({"mask": _relative(found.mask, out) if found.mask else ""} if masked else {}),
        **found.labels,
        "view": found.view,
        "age": found.age,
        "sex": found.sex,
        "split": found.split,
        "site": found.site,
        "study_uid": found.study if found.pseudonymous else "",
    }


def _renumbered(path: Path, classes: Mapping[int, int], folder: Path, source: Path) -> Path:
    """A mask written anew, under its name in the archive, with other numbers for some of its classes."""
    mask, new = read_nifti(path, labels=True), folder / path.relative_to(source)
    values = mask.values.copy()
    for number, other in classes.items():
        values[mask.values == number] = other
    make_private(new.parent)
    write_nifti(replace(mask, values=values), new)
    return new


def _relative(path: Path, out: Path) -> str:
    return os.path.relpath(path, out)


def _listed(report: Imported) -> str:
    return ", ".join(f"{count} × {what}" for what, count in report.unmatched.items())


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A file that its owner alone may read, and that takes its name when everything is in it."""
    with (
        replacing(path, mode=0o600, shared=True) as descriptor,
        os.fdopen(descriptor, "w", encoding="utf-8", newline="", closefd=False) as file,
    ):
        yield file
