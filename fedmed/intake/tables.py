"""Tables as hospitals export them, CSV or XLSX, one row at a time: RIS, registries, REDCap, and public label files."""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, TextIO, cast

from fedmed.durable import replacing
from fedmed.errors import DataError
from fedmed.imaging.separators import separator_of

Cells = dict[str, str]  # by column
EXCEL = (".xlsx", ".xlsm")


def table_rows(path: Path, *, needed: Sequence[str] = (), notes: bool = False) -> Iterator[tuple[int, Cells]]:
    """Every row that is not blank, with its number in the file.

    Args:
        path: CSV in UTF-8 (perhaps compressed as .csv.gz), or the first sheet of an XLSX. The first row names columns.
        needed: columns that there have to be, once, whether or not any row follows.
        notes: whether a table of one column may have notes beside it, which are passed over.

    Yields:
        The row's number, the header being row 1, and its cells as text without blanks around them. Missing cells are
        empty.

    Raises:
        DataError: it cannot be read as a table, lacks a column or has it twice, or a row is longer than the header, as
            where a cell holds a separator without quotation marks.
    """
    rows = _excel(path) if path.suffix.lower() in EXCEL else _csv(path)
    columns: list[str] = []
    for number, cells in rows:
        texts = [cell.strip() for cell in cells]
        if not columns:
            columns = texts
            if not any(columns):
                raise DataError(f"{path.name}: the first row names no columns")
            for name in needed:
                if columns.count(name) != 1:
                    many = f"{columns.count(name)} columns" if name in columns else "no column"
                    raise DataError(f'{path.name}: the first row names {many} "{name}"')
        elif any(texts[len(columns) :]) and not (notes and len(columns) == 1 and texts[0]):
            raise DataError(
                f"{path.name}: row {number} has more cells than the first row names columns; is "
                "there a title above the names?"
            )
        elif any(texts):
            yield number, dict(zip(columns, texts + [""] * (len(columns) - len(texts)), strict=False))
    if not columns:
        raise DataError(f"{path.name}: the table is empty")


def columns_of(path: Path) -> tuple[str, ...]:
    """The columns of a table that has at least one row.

    Raises:
        DataError: as `table_rows`, or it has no rows.
    """
    for _, cells in table_rows(path):
        return tuple(cells)
    raise DataError(f"{path.name}: the table has no rows")


def replace_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV for its owner alone; it takes the place of an older one whole or not at all.

    Args:
        path: of the file.
        columns: of the rows; what else they hold is left out.
        rows: that may be read from the older one.
    """
    with (
        replacing(path, mode=0o600) as descriptor,
        os.fdopen(descriptor, "w", encoding="utf-8", newline="", closefd=False) as file,
    ):
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with _opened(path) as file:
            yield from enumerate(csv.reader(file, delimiter=separator_of(file)), 1)
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: not in UTF-8; save it as CSV UTF-8, or as XLSX") from None
    except (csv.Error, EOFError):
        raise DataError(f"{path.name}: not a CSV") from None
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror or 'damaged'})") from None


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _excel(path: Path) -> Iterator[tuple[int, list[str]]]:
    import openpyxl  # heavy, and only spreadsheets need it

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # what the file says of its size may be wrong, and would cut it
            for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
                yield number, [_text(cell) for cell in cells]
        finally:
            book.close()
    except FileNotFoundError:
        raise DataError(f"{path.name}: no such file") from None
    except Exception as error:  # openpyxl raises whatever its parsers do
        why = type(error).__name__
        raise DataError(
            f"{path.name}: not an XLSX that can be read ({why}); save it anew in a spreadsheet, or as CSV UTF-8"
        ) from None


def _text(cell: Any) -> str:
    """A cell as a CSV would show it: whole numbers without a point, dates by ISO 8601."""
    match cell:
        case None:
            return ""
        case bool():
            return str(int(cell))
        case float() if cell.is_integer():
            return str(int(cell))
        case datetime() if cell.time() == time():
            return cell.date().isoformat()
        case datetime() | date() | time():
            return cell.isoformat()
        case _:
            return str(cell)
