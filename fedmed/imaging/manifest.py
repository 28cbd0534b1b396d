"""The site manifest: a CSV with one row per image (see docs, "Site manifest").

`patient_id` and `image` are required; `mask` for segmentation; for classification one column per label with 0, 1 or
nothing (unknown). Paths are relative to the manifest. Every refusal is one line that names a row, never a patient.

`image` names a DICOM, PNG or JPEG file, the folder of a DICOM series, a multi-frame DICOM file, or a NIfTI; `mask` a
PNG beside a picture, and beside a volume a NIfTI, a DICOM segmentation, an RT structure set or a series of class
numbers. Which of them a run can use depends on its data.items, and is found out when they are read.

Several modalities of one item stand in one cell with ";" between them, in the same order in every row; an empty place
is a modality that this item lacks.
"""

from __future__ import annotations

import csv
import difflib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmed.config import TaskConfig
from fedmed.errors import DataError, UnfitRow
from fedmed.imaging.recipe import BETWEEN
from fedmed.imaging.separators import separator_of

# Columns that are no labels
ABOUT = ("patient_id", "image", "mask", "study_uid", "series_uid", "view", "split", "site", "age", "sex")
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
LABEL_VALUES = {0.0: 0.0, 1.0: 1.0}  # one number of each for all rows
Labels = tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One picture or volume."""

    number: int  # line in the CSV, the header being line 1
    patient: str
    modalities: tuple[Path | None, ...]  # one image for most; None = this item lacks it, and never all of them
    mask: Path | None
    labels: Labels  # in the task's order; NaN = unknown; empty for segmentation
    split: str  # "" | "train" | "validation" | "test"
    fault: str = ""  # why it does not fit the task

    @property
    def images(self) -> tuple[Path, ...]:
        """The image of every modality that is there."""
        return tuple(image for image in self.modalities if image is not None)

    @property
    def image(self) -> Path:
        """The first of them, whose geometry is the item's."""
        return self.images[0]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checked manifest."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def patients(self) -> tuple[str, ...]:
        """Who each row is of."""
        return tuple(row.patient for row in self.rows)

    @property
    def modalities(self) -> int:
        """How many places every row has."""
        return len(self.rows[0].modalities)


def read_manifest(path: Path, task: TaskConfig, *, lenient: bool = False) -> Manifest:
    """Read and check a manifest. Whether images exist is found out when they are read.

    Args:
        path: the CSV, UTF-8 with or without byte order mark, with commas, semicolons or tabs.
        task: which columns are needed.
        lenient: whether rows that do not fit the task stay, with their `fault`.

    Raises:
        DataError: one line: the file, the column or the rows that are wrong.
        UnfitRow: a row has no mask, or a label that is none.
    """
    header, lines = read_table(path)
    _check_columns(path, header, task)
    shared: dict[Labels, Labels] = {}  # rows of equal labels hold one tuple of them
    rows = tuple(_row(path, number, dict(zip(header, cells, strict=True)), task, shared) for number, cells in lines)
    if not rows:
        raise DataError(f"{path}: the manifest has no rows")
    unfit = next((row for row in rows if row.fault), None)
    if unfit is not None and not lenient:
        raise UnfitRow(f"{path}: row {unfit.number}{unfit.fault}")
    _check_modalities(path, rows)
    _check_images_differ(path, rows)
    _check_splits(path, rows)
    return Manifest(path=path, rows=rows)


def without_patients(manifest: Manifest, withdrawn: frozenset[str]) -> Manifest:
    """A manifest as if it did not name some patients.

    Raises:
        DataError: it names nobody else.
    """
    rows = tuple(row for row in manifest.rows if row.patient not in withdrawn)
    if not rows:
        text = "every patient of the manifest has opted out"
        raise DataError(f"{manifest.path}: {text}", public=text)
    return replace(manifest, rows=rows)


def read_table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Header, and (line number, cells) of every row of a manifest that is not blank, read as they are asked for.

    Raises:
        DataError: the file cannot be read; or, by the time it is asked for, a row has more or fewer cells than the
            header.
    """
    lines = _lines(path)
    _, header = next(lines, (0, []))
    if not header:
        raise DataError(f"{path}: the manifest is empty")
    return header, lines


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of the header, and of every row that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=separator_of(file, "patient_id"))
            header = [name.strip() for name in next(reader, [])]
            yield reader.line_num, header
            for row in reader:
                if not any(cells := [cell.strip() for cell in row]):
                    continue
                if len(cells) != len(header):
                    text = f"row {reader.line_num} has {len(cells)} cells, the header has {len(header)}"
                    raise DataError(f"{path}: {text}")
                yield reader.line_num, cells
    except FileNotFoundError:
        raise DataError(f"{path}: no such manifest") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: not a CSV in UTF-8") from None


def _check_columns(path: Path, header: Sequence[str], task: TaskConfig) -> None:
    if "patient_id" not in header and "image" not in header:  # it may be a patient's row, and is not quoted
        raise DataError(f'{path}: no column "patient_id" or "image"; the first line names the columns')
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f'{path}: column "{repeated[0]}" appears twice')
    needed = ["patient_id", "image", *(["mask"] if task.kind == "segmentation" else task.labels)]
    for column in needed:
        if column not in header:
            raise DataError(f'{path}: no column "{column}"{_nearest(column, header)}')


def _nearest(column: str, header: Iterable[str]) -> str:
    folded = {name.casefold(): name for name in header}
    close = difflib.get_close_matches(column.casefold(), folded, n=1, cutoff=0.5)
    return f'; the nearest is "{folded[close[0]]}"' if close else f"; there are {', '.join(folded.values())}"


def _row(path: Path, number: int, record: Mapping[str, str], task: TaskConfig, shared: dict[Labels, Labels]) -> Row:
    segmentation = task.kind == "segmentation"
    labels = () if segmentation else tuple(_label(record[label]) for label in task.labels)
    for column in ("patient_id", "image"):
        if not record[column]:
            raise DataError(f"{path}: row {number} has no {column}")
    modalities = images_of(record["image"], path.parent)
    if not any(modalities):
        raise DataError(f"{path}: row {number} has no image")
    split = record.get("split", "").casefold()
    if split and split not in SPLITS:
        raise DataError(f"{path}: row {number}: split is none of train, validation, test")
    return Row(
        number=number,
        patient=record["patient_id"],
        modalities=modalities,
        mask=path.parent / record["mask"] if segmentation else None,
        labels=shared.setdefault(labels, labels),
        split=SPLITS.get(split, ""),
        fault=_fault(record, task),
    )


def _fault(record: Mapping[str, str], task: TaskConfig) -> str:
    """Why a row does not fit the task, to be read after its number."""
    if task.kind == "segmentation":
        return "" if record["mask"] else " has no mask"
    wrong = [label for label in task.labels if record[label] and math.isnan(_label(record[label]))]
    return f': "{wrong[0]}" is neither 0, 1 nor empty' if wrong else ""


def _label(text: str) -> float:
    """0 or 1; NaN for what is neither."""
    try:
        return LABEL_VALUES.get(float(text), math.nan)
    except ValueError:
        return math.nan


def images_of(cell: str, folder: Path) -> tuple[Path | None, ...]:
    """The modalities that a cell of the column "image" names, in order; None = an empty place.

    Args:
        cell: one path, or several with ";" between them.
        folder: to which they are relative.
    """
    return tuple(folder / name if name else None for name in map(str.strip, cell.split(BETWEEN)))


def cell_of(modalities: Sequence[Path | None]) -> str:
    """The inverse of `images_of`, for whoever writes a manifest.

    Raises:
        DataError: a path holds the sign that would stand between them.
    """
    names = ["" if image is None else str(image) for image in modalities]
    if any(BETWEEN in name for name in names):
        raise DataError(f'a folder of images has "{BETWEEN}" in its name, which separates modalities; rename it')
    return BETWEEN.join(names)


def _check_modalities(path: Path, rows: Sequence[Row]) -> None:
    """A place means one modality: with another number of places nobody could say which one is missing."""
    count = len(rows[0].modalities)
    others = [row.number for row in rows if len(row.modalities) != count]
    if others:
        raise DataError(
            f"{path}: row {rows[0].number} names {count} modalities, other rows another number ({listed(others)}); "
            f'leave the place of a missing one empty, as in "a{BETWEEN}{BETWEEN}c"'
        )


def _check_images_differ(path: Path, rows: Sequence[Row]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        for image in map(os.path.normpath, row.images):
            if image in seen:
                one = seen[image] == row.number
                which = (
                    f"row {row.number} names one image twice"
                    if one
                    else (f"rows {seen[image]} and {row.number} name the same image")
                )
                raise DataError(f"{path}: {which}")
            seen[image] = row.number
    holders = {str(Path(image).parent): number for image, number in reversed(seen.items())}
    for folder, number in holders.items():  # a slice of another row's volume would be learnt twice, or tested on
        for above in (Path(folder), *Path(folder).parents):
            if str(above) in seen:
                raise DataError(f"{path}: row {seen[str(above)]} names the folder in which row {number}'s image lies")


def _check_splits(path: Path, rows: Sequence[Row]) -> None:
    """Either every row has a split or none has, and a patient is in one split only: otherwise tests see training."""
    without = [row.number for row in rows if not row.split]
    if without and len(without) < len(rows):
        raise DataError(f"{path}: {len(without)} rows have no split while others have ({listed(without)})")
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.patient].add(row.split)
    torn = [patient for patient, names in splits.items() if len(names) > 1]
    if torn:
        numbers = [row.number for row in rows if row.patient in set(torn)]
        plural = "1 patient is" if len(torn) == 1 else f"{len(torn)} patients are"
        raise DataError(f"{path}: {plural} in more than one split ({listed(numbers)})")


def listed(numbers: Sequence[int], *, at_most: int = 6) -> str:
    """Row numbers for a message: "rows 3, 5, 8" and "…" when there are more."""
    shown = ", ".join(str(number) for number in numbers[:at_most])
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{', …' if len(numbers) > at_most else ''}"


def read_records(path: Path) -> tuple[tuple[str, ...], tuple[dict[str, str], ...]]:
    """A manifest's columns, and every row of it as text by column, for whoever deals rows to other manifests.

    Raises:
        DataError: it cannot be read, or a row has another number of cells than the header.
    """
    header, lines = read_table(path)
    return tuple(header), tuple(dict(zip(header, cells, strict=True)) for _, cells in lines)


def read_columns(path: Path) -> tuple[tuple[int, ...], dict[str, list[str]]]:
    """The line of every row, and the columns, each as the text of all rows: a quarter of the memory of records.

    Raises:
        DataError: as `read_records`, or a column is missing that every manifest has, or there are no rows.
    """
    header, lines = read_table(path)
    for name in ("patient_id", "image"):
        if name not in header:
            raise DataError(f'{path}: no column "{name}"; the first line names the columns')
    numbers: list[int] = []
    columns: list[list[str]] = [[] for _ in header]
    for number, cells in lines:
        numbers.append(number)
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    if not numbers:
        raise DataError(f"{path}: the manifest has no rows")
    return tuple(numbers), dict(zip(header, columns, strict=True))
