"""Which sign stands between the cells of a CSV: German and French Excel write semicolons, and some programs say so."""

from __future__ import annotations

import csv
import re
from typing import TextIO

SEPARATORS = (",", ";", "\t")
SAID = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # a line before the header, which Excel obeys and does not show


def separator_of(file: TextIO, column: str | None = None) -> str:
    """The separator of a CSV.

    Args:
        file: at its beginning; it stands at its header afterwards.
        column: that the header has; None = not known. Cells in quotation marks may hold separators.
    """
    first = file.readline().rstrip("\r\n")
    if said := SAID.fullmatch(first):
        return said[1]
    file.seek(0)
    cells = {sign: [cell.strip() for cell in next(csv.reader([first], delimiter=sign), [])] for sign in SEPARATORS}
    fitting = [sign for sign in SEPARATORS if column is None or column in cells[sign]]
    return max(fitting or SEPARATORS[:1], key=lambda sign: len(cells[sign]))
