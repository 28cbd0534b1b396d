"""What to pull: conditions as a user writes them, and lists of accessions or patients from a table."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import ConfigError, DataError
from fedmed.intake.labels import JOINS, bare
from fedmed.intake.tables import table_rows

KEYS = ("modality", "date", "body-part", "description")
COLUMNS = {"accessions": JOINS["accession"], "patients": JOINS["patient"]}  # what a list gives, by names of its column
DATE = re.compile(r"\d{8}(-(\d{8})?)?|-\d{8}")  # PS3.4 C.2.2.2.5
WILD = re.compile(r"[*?\\]")  # an id of a list is looked for as it is


@dataclass(frozen=True, kw_only=True)
class Query:
    """Conditions that a series must all meet; empty = any."""

    modalities: tuple[str, ...] = ()
    dates: str = ""  # of the study: a day or a range, as DICOM writes them
    body_part: str = ""
    description: str = ""  # words that stand in the description of the study or of the series, in any case
    accessions: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series that an archive offers. It identifies a patient, so it is never written or shown."""

    study: str
    series: str
    modality: str
    description: str  # of study and series
    body_part: str = ""  # "" = the archive does not say, as for the three below
    accession: str = ""
    patient: str = ""
    date: str = ""  # of the study, YYYYMMDD
    objects: int = 0  # that it has; 0 = the archive does not say
    refused: str = ""  # why the archive does not tell of which series the study is; the others are then empty
    may_pass: bool = False  # what it refused so, it may tell later


def parse_query(text: str, table: Path | None = None) -> Query:
    """Conditions from `modality=DX,CR date=20240101-20241231 body-part=CHEST description="chest pa"` and a table.

    Args:
        text: conditions with blanks between them.
        table: with one column `accession` or `patient`, or what a RIS calls it.

    Raises:
        ConfigError: a condition is misspelt, or there is none at all.
        DataError: the table cannot be used.
    """
    found: dict[str, str] = {}
    try:
        words = shlex.split(text)
    except ValueError:
        raise ConfigError("--query: a quotation mark is not closed") from None
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value or key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1)
            text = f"; did you mean {nearest[0]}=?" if nearest else ""
            raise ConfigError(f"--query: expected {', '.join(f'{one}=…' for one in KEYS)}{text}")
        if key in found:
            raise ConfigError(f"--query: {key} stands there twice; write {key}=A,B where several are meant")
        found[key] = value
    if "date" in found and not DATE.fullmatch(found["date"]):
        raise ConfigError("--query: date is a day as 20240131 or a range as 20240101-20241231, 20240101- or -20241231")
    first, _, last = found.get("date", "").partition("-")
    if first and last and last < first:
        raise ConfigError("--query: date ends before it begins")
    listed = read_list(table) if table else {}
    if not found and not listed:
        raise ConfigError("nothing says what to pull: give --query, --list or both")
    return Query(
        modalities=tuple(one.strip().upper() for one in found.get("modality", "").split(",") if one.strip()),
        dates=found.get("date", ""),
        body_part=found.get("body-part", "").upper(),
        description=found.get("description", ""),
        **listed,
    )


def read_list(table: Path) -> dict[str, tuple[str, ...]]:
    """The accessions or patients of a table, each once, by the field of `Query` that they belong to.

    Raises:
        DataError: it cannot be read, or has no column of that name, or both.
    """
    rows = [cells for _, cells in table_rows(table)]
    header = tuple(rows[0]) if rows else ()
    known = [(name, field) for name in header for field, names in COLUMNS.items() if bare(name) in names]
    if rows and len(known) != 1:
        there = ", ".join(f'"{name}"' for name, _ in known)  # no other: it may be a patient's number
        do = f"there are {there}: delete all but one" if known else "the first line names the columns"
        raise DataError(f'{table.name}: expected one column "accession" or "patient"; {do}')
    values = [row[known[0][0]] for row in rows]
    if any(WILD.search(value) for value in values):
        raise DataError(f"{table.name}: a value holds *, ? or \\, which an archive would take for a pattern")
    if not any(values):
        raise DataError(f"{table.name}: the list is empty")
    return {known[0][1]: tuple(dict.fromkeys(filter(None, values)))}


def meets(query: Query, series: Series) -> bool:
    """Whether a series meets a query: an archive need not know every condition. What it does not say is let through."""
    described = series.description.casefold()
    return bool(series.refused) or (
        _among(query.accessions, series.accession)
        and _among(query.patients, series.patient)
        and _within(query.dates, series.date)
        and (not query.modalities or series.modality in query.modalities)
        and (not query.body_part or series.body_part in ("", query.body_part))
        and all(word in described for word in query.description.casefold().split())
    )


def _among(wanted: tuple[str, ...], said: str) -> bool:
    return not wanted or not said or said.casefold() in {one.strip().casefold() for one in wanted}


def _within(dates: str, said: str) -> bool:
    first, dash, last = dates.partition("-")
    return not dates or not said or first <= said <= ((last or said) if dash else first)


def questions(query: Query) -> list[dict[str, str]]:
    """The study-level questions that together find the studies of a query: keyword to value (PS3.4 C.6.2.1)."""
    days = {"StudyDate": query.dates} if query.dates else {}
    if query.accessions or query.patients:
        return [days | {"AccessionNumber": one} for one in query.accessions] + [
            days | {"PatientID": one} for one in query.patients
        ]
    return [days | {"ModalitiesInStudy": one} for one in query.modalities] or [days]
