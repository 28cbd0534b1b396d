"""Which held-out images belong to which subgroup: sex, age band, view, scanner, where the manifest has the column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.imaging.manifest import read_table
from fedmed.types import SMALL

COLUMNS = {"sex": ("sex",), "age": ("age",), "view": ("view",), "scanner": ("scanner", "manufacturer", "device")}
BANDS = ((18, "under 18"), (40, "18 to 39"), (60, "40 to 59"), (80, "60 to 79"), (200, "80 and over"))  # years, below
MOST_GROUPS = 8  # of one column; a column with more is no way to group


def groups_of(manifest: Path, rows: NDArray[np.int64]) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Returns the masks (N,) of each group by column; nothing for data without a manifest.

    Args:
        manifest: of the place.
        rows: (N,) line of the manifest that each judged image is of.
    """
    if manifest.suffix.lower() != ".csv" or not manifest.is_file():
        return {}
    records = _records(manifest)
    found: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for column, names in COLUMNS.items():
        name = next((name for name in names if any(name in record for record in records.values())), "")
        texts = [records.get(int(row), {}).get(name, "") for row in rows] if name else []
        values = np.array([_band(text) if column == "age" else text.upper() for text in texts])
        groups = sorted(set(values) - {""}, key=_order)
        if 2 <= len(groups) <= MOST_GROUPS:
            found[column] = {str(group): values == group for group in groups}
    return found


def untold(patients: Mapping[str, int]) -> set[str]:
    """Returns the groups of a column of which nothing is told, from the patients of each.

    Those of few patients, and the next smallest too where the total would tell them: where a few stand alone, or are
    few even together.
    """
    order = sorted(patients, key=lambda group: patients[group])
    few = [group for group in order if patients[group] < SMALL]
    alone = len(few) == 1 or sum(patients[group] for group in few) < SMALL
    return set(order[: len(few) + 1] if few and alone else few)


def _records(manifest: Path) -> Mapping[int, Mapping[str, str]]:
    """The rows by their line in the file, as `imaging.manifest` numbers them; columns in lower case."""
    header, lines = read_table(manifest)
    names = [name.lower() for name in header]
    return {number: dict(zip(names, cells, strict=True)) for number, cells in lines}


def _band(text: str) -> str:
    """The age band of "63", "63.0" or DICOM's "063Y"; nothing for what is no age in years."""
    try:
        years = float(text.upper().removesuffix("Y"))
    except ValueError:
        return ""
    return next((name for below, name in BANDS if 0 <= years < below), "")


def _order(group: str) -> tuple[int, str]:
    names = [name for _, name in BANDS]
    return (names.index(group) if group in names else 0, group)
