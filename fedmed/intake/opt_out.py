"""Patients who withdrew: excluded when images are imported, and at every later round.

The hospital keeps one table, of its own ids or of pseudonyms; a listed patient is meant under both. What fedmed keeps
of it is pseudonyms, which are keyed digests: without the site's key nobody can try hospital numbers against them.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedmed.durable import write_atomically
from fedmed.errors import DataError
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.tables import table_rows

COLUMN = "patient_id"
PSEUDONYM = re.compile(r"P[A-Z2-7]{16}")
LONGEST_NUMBER = 16  # digits of an id, with zeros before it
NOTE = re.compile(r"[;\t|]")  # what may part an id from a note beside it


def opted_out(path: Path, pseudonyms: Pseudonyms) -> frozenset[str]:
    """Everything that listed patients may be called; see `listed`."""
    return frozenset().union(*listed(path, pseudonyms).values())


def listed(path: Path, pseudonyms: Pseudonyms) -> dict[int, frozenset[str]]:
    """What a listed patient may be called in a manifest, by row: the id as it stands, and the site's pseudonym.

    An id of digits alone is meant with any zeros before it: spreadsheets drop them.

    Args:
        path: CSV or XLSX with a column `patient_id`; where it is the only one, notes may stand beside it.
        pseudonyms: of the site.

    Raises:
        DataError: it cannot be read, or has no column of that name; a list without a header would lose the first
            patient. Nobody is trained on then.
    """
    try:
        rows = [(number, row[COLUMN]) for number, row in table_rows(path, needed=(COLUMN,), notes=True)]
    except DataError as error:
        public = "the site's list of patients who withdrew cannot be read"
        raise DataError(f"the list of patients who withdrew: {error}", public=public) from None
    # A header of one column tells no separator, so a note behind another one than the comma stands in the id's cell.
    ids = {number: {patient, NOTE.split(patient)[0].strip()} for number, patient in rows if patient}
    meant = {number: {one for each in own for one in _with_zeros(each)} for number, own in ids.items()}
    return {number: frozenset((*own, *map(pseudonyms.patient, own))) for number, own in meant.items()}


def _with_zeros(patient: str) -> set[str]:
    if not (patient.isascii() and patient.isdecimal()):
        return {patient}
    digits = patient.lstrip("0") or "0"
    return {patient, *(digits.zfill(length) for length in range(len(digits), LONGEST_NUMBER + 1))}


def remembered(path: Path) -> frozenset[str]:
    """The names that `remember` wrote: pseudonyms already, of which no others are made.

    Raises:
        DataError: the table is there and cannot be read, or holds what is no pseudonym.
    """
    if not path.exists():
        return frozenset()
    names = frozenset(row[COLUMN] for _, row in table_rows(path, needed=(COLUMN,)))
    if not all(map(PSEUDONYM.fullmatch, names)):
        raise DataError(f"{path.name}: holds what is no pseudonym; name your own list with --opt-out")
    return names


def remember(names: frozenset[str], path: Path) -> None:
    """Write the pseudonyms among these names as a table for `remembered`, whole or not at all, for its owner alone."""
    text = "\n".join([COLUMN, *sorted(filter(PSEUDONYM.fullmatch, names))]) + "\n"
    write_atomically(path, text.encode("ascii"), mode=0o600, shared=True)
