"""DICOM: a tree of files, which is de-identified into a folder of the site's own, and such folders as archives.

`fedmed data pull` and `take_in` leave the same: `images/`, `quarantine/` and a table of what became of every object. An
object that a person moves from quarantine to the place that the table names for it counts at the next import.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pydicom

from fedmed.durable import make_private
from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.dicom.opening import is_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.intake.journal import COLUMNS as FACTS
from fedmed.intake.journal import JOURNAL, incomplete, is_image, objects
from fedmed.intake.journal import TABLE as PULLED
from fedmed.intake.keep import APART, REASONS, REMOVED, WITHDREW, keep, where_now, write_reasons
from fedmed.intake.kinds.found import Found, Unmatched
from fedmed.intake.kinds.regions import KINDS, Regions, regions_of
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.quarantine import CAPTURE, SCREEN
from fedmed.intake.tables import replace_table, table_rows
from fedmed.types import OnProgress

TAKEN, TAKING = "imported.csv", ".importing"  # the latter is there until an import has ended
COLUMNS = (*FACTS, "reason", "source")
UNREADABLE = "unreadable: "  # how a reason begins
IN_SERIES = ("CT", "MR", "PT")  # modalities whose series is one volume


def dicom(source: Path) -> Iterator[Found | Unmatched]:
    """The images of a folder that `fedmed data pull` or `take_in` filled: single ones, and CT, MR and PET by series.

    A segmentation or structure set is the mask of the one series that it refers to.

    Raises:
        DataError: it is no such folder, or the pull or the import into it has not ended.
    """
    if not is_filled(source):
        raise DataError(f"{source}: holds neither {PULLED} nor {TAKEN}")
    tables = _tables(source)
    torn = _incomplete(source)
    masks = _masks(source, tables, torn)
    seen: set[str] = set()
    if (source / JOURNAL).is_file():
        yield from _apart(source)
    yield from masks.unmatched
    for table in tables:
        for row in _rows(table):
            if not row.get("source", PULLED):  # cut off by a kill: its object was kept again
                continue
            image, reason = row.get("image", ""), row.get("reason", "")
            path = source / image
            if not image or not path.exists():
                yield Unmatched(
                    what=reason or REMOVED, place=image, found=_found(path, row) if reason and image else None
                )
            elif row["modality"] in IN_SERIES and row["series_uid"] in torn:
                what = "slice of a series of which another slice is missing"
                yield Unmatched(what=what, place=image, found=_found(path, row))
            elif row["modality"] in KINDS:
                continue
            else:
                path = path.parent if row["modality"] in IN_SERIES and path.is_file() else path
                if (name := os.fspath(path)) not in seen:
                    seen.add(name)
                    yield replace(_found(path, row), mask=masks.of_series.get(path), masked=bool(masks.of_series))


def is_filled(source: Path) -> bool:
    """Whether a pull or `take_in` filled a folder: what is in it was de-identified, and is not to be once more.

    Raises:
        DataError: a pull or `take_in` began to fill it and has not ended.
    """
    if (source / JOURNAL).is_file() and not (source / PULLED).is_file():
        raise DataError("the pull into this folder has not ended: give the same fedmed data pull again, then import")
    if (source / TAKING).is_file():
        raise DataError("the import into this folder has not ended: give the same fedmed data import again")
    return bool(_tables(source))


def _tables(source: Path) -> list[Path]:
    """The tables of fedmed's own in a folder; a hospital may call another one so."""
    return [source / name for name, columns in ((PULLED, FACTS), (TAKEN, COLUMNS)) if _begins(source / name, columns)]


def _rows(table: Path) -> Iterator[dict[str, str]]:
    """The rows of a table; of a pull's also what was released since then, of which `pulled.csv` has no row yet."""
    folder, released = table.parent, dict[str, dict[str, str]]()
    if table.name == PULLED and (folder / JOURNAL).is_file():
        lines = (line for line in objects(folder) if line.get("set_apart") and is_image(line, folder))
        released = {line["image"]: line for line in lines}
    for _, row in table_rows(table):
        released.pop(row.get("image", ""), None)
        yield row
    yield from released.values()


def _begins(path: Path, columns: tuple[str, ...]) -> bool:
    """Whether a file names these columns in its first row."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline().decode("utf-8-sig", errors="replace")
    return set(columns) <= {cell.strip(' \r\n"') for cell in re.split("[,;\t]", first)}


def _masks(source: Path, tables: Iterable[Path], torn: set[str]) -> Regions:
    """The segmentations and structure sets that are there, with the series that they outline."""

    def there(modalities: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
        for table in tables:
            for row in _rows(table):
                whole = row.get("source", PULLED) and row.get("image") and row["series_uid"] not in torn
                if whole and row["modality"] in modalities and (source / row["image"]).exists():
                    yield row["patient_id"], source / row["image"]

    masks = sorted(set(there(KINDS)))
    return regions_of(masks, there(IN_SERIES), source) if masks else Regions()


def _apart(source: Path) -> Iterator[Unmatched]:
    """What a pull set apart and nobody has looked at yet: `pulled.csv` has no row of it."""
    for line in objects(source):
        if line.get("set_apart") and where_now(source, line["image"]) == APART:
            found = _found(source / line["image"], line)
            yield Unmatched(what=f"in quarantine: {line['reason']}", place=line["image"], found=found)


def _incomplete(source: Path) -> set[str]:
    """Series whose objects are not all among the images: what is left is not the volume that was acquired.

    One is in quarantine, cannot be read, or has not been pulled yet. A picture of a screen that a person deleted there
    was none of the slices.
    """
    series = incomplete(source) if (source / JOURNAL).is_file() else set()
    if (source / REASONS).is_file():
        for _, row in table_rows(source / REASONS):
            now = where_now(source, row["image"])
            if now == APART or (now == REMOVED and row["reason"] not in (CAPTURE, SCREEN)):
                series.add(Path(row["image"]).parent.name)
    if source / TAKEN in _tables(source):
        series |= {row["series_uid"] for _, row in table_rows(source / TAKEN) if row["reason"].startswith(UNREADABLE)}
    return series - {""}


def _found(path: Path, row: dict[str, str]) -> Found:
    return Found(
        patient=row["patient_id"],
        images=(path,),
        study=row["study_uid"],
        accession=row["accession"],
        view=row["view"],
        age=row["age"],
        sex=row["sex"],
        pseudonymous=True,
    )


def take_in(
    source: Path,
    folder: Path,
    pseudonyms: Pseudonyms,
    progress: OnProgress | None = None,
    *,
    withdrawn: frozenset[str] = frozenset(),
) -> set[str]:
    """De-identify every DICOM file below `source` into `folder`, or into quarantine there; see `keep`.

    What was done is written down file by file in `imported.csv`, under keyed names. A second call goes on where the
    first one ended, and takes in files that are new, have changed, or could not be read.

    Args:
        source: any tree of files. What is no DICOM is passed over.
        folder: made if it is not there.
        pseudonyms: of the site.
        progress: told (done, all) in files.
        withdrawn: pseudonyms of patients who withdrew. Nothing of them is written, not even that they are there.

    Returns:
        Those of `withdrawn` who are there.

    Raises:
        DataError: the folder cannot be written.
    """
    table = folder / TAKEN
    make_private(folder)
    (folder / TAKING).touch(mode=0o600)
    done, met = _done(table), set()
    files = [
        Path(place, name)
        for place, _, names in os.walk(source, followlinks=True)
        if not Path(place).resolve().is_relative_to(folder.resolve())
        for name in names
    ]
    with os.fdopen(
        os.open(table, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8", newline=""
    ) as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        else:
            file.write("\n")  # a line that was cut off by a kill ends here; blank ones count for nothing
        for number, path in enumerate(sorted(files), 1):
            name = pseudonyms.keys.link("file", _state(path, source).encode()).hex()
            if name not in done:
                row = _kept(path, folder, pseudonyms, withdrawn)
                if row["reason"] == WITHDREW:
                    met.add(row["patient_id"])
                else:
                    writer.writerow({**row, "source": name})
                    file.flush()
            if progress is not None:
                progress(number, len(files))
    write_reasons(folder)
    (folder / TAKING).unlink(missing_ok=True)
    return met


def _state(path: Path, source: Path) -> str:
    """Which file, and as of when; of a link to nowhere, only which."""
    name = os.path.relpath(path, source)
    try:
        facts = path.stat()
    except OSError:
        return name
    return f"{name} {facts.st_size} {facts.st_mtime_ns}"


def _kept(path: Path, folder: Path, pseudonyms: Pseudonyms, withdrawn: frozenset[str]) -> dict[str, Any]:
    """A line of the table."""
    try:
        if not is_dicom(path):
            return {"reason": "not DICOM"}
        kept = keep(path, folder, pseudonyms, withdrawn)
    except (UnreadableImage, OSError) as error:
        why = error if isinstance(error, UnreadableImage) else error.strerror
        return {"reason": f"{UNREADABLE}{why}", "series_uid": _series(path, pseudonyms)}
    facts = asdict(kept)
    reason = f"in quarantine: {kept.reason}" if kept.set_apart else kept.reason
    return {name: facts[name] for name in FACTS} | {"reason": reason or ""}


def _series(path: Path, pseudonyms: Pseudonyms) -> str:
    """The series of an object that cannot be read, keyed, if at least its header says it."""
    try:
        with plain_errors():
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"], force=True)
            uid = str(header.get("SeriesInstanceUID") or "")
    except (UnreadableImage, OSError):
        return ""
    return pseudonyms.uid(uid) if uid else ""


def _done(table: Path) -> set[str]:
    """The files that a table has rows of. Rows of those that could not be read go: they are tried again."""
    if not table.is_file():
        return set()
    rows = [row for _, row in table_rows(table) if row["source"]]
    read = [row for row in rows if not row["reason"].startswith(UNREADABLE)]
    if len(read) < len(rows):
        replace_table(table, COLUMNS, read)
    return {row["source"] for row in read}
