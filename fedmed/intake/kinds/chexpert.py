"""CheXpert (Irvin et al. 2019, arXiv:1901.07031): 14 observations, some of them uncertain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from fedmed.errors import DataError
from fedmed.intake.kinds.found import UNCERTAIN, Found, Unmatched
from fedmed.intake.persons import sex_of, years
from fedmed.intake.tables import Cells, table_rows

FILES = {"train.csv": "train", "valid.csv": "validation", "test.csv": "test"}  # official, by patient
ABOUT = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")  # before the observations
PATIENT = re.compile(r"patient\d+")
VALUES = {"1": "1", "1.0": "1", "0": "0", "0.0": "0", "-1": UNCERTAIN, "-1.0": UNCERTAIN, "": ""}


def chexpert(source: Path) -> Iterator[Found | Unmatched]:
    """The images that `train.csv`, `valid.csv` and `test.csv` of a folder name. A blank is unknown, never negative.

    The full-size set comes as four folders, "CheXpert-v1.0 batch 1 (validate & csv)" and on; they may lie side by side.

    Raises:
        DataError: none of the files is there, or one has other columns.
    """
    found = {name: [*source.glob(name), *sorted(source.glob(f"*/{name}"))] for name in FILES}
    tables = {name: paths[0] for name, paths in found.items() if paths}
    holders = (source, *sorted(source.glob("*batch*")))
    if not tables:
        raise DataError(f"{source}: holds no {' or '.join(FILES)}, as CheXpert does")
    for name, table in tables.items():
        for number, row in table_rows(table):
            patient = PATIENT.search(row.get("Path", ""))
            if patient is None:
                raise DataError(f"{name}: row {number} has no Path of CheXpert's form")
            image = _image(holders, row["Path"])
            if image is None:
                yield Unmatched(what="row without image", place=f"row {number} of {name}")
                continue
            yield Found(
                patient=patient.group(),
                images=(image,),
                study="/".join(PurePosixPath(row["Path"]).parts[-3:-1]),
                labels={label: observed(text, name, number) for label, text in row.items() if label not in ABOUT},
                view=_view(row),
                age=years(row.get("Age", "")),
                sex=sex_of(row.get("Sex", "")),
                split=FILES[name],
            )


def observed(text: str, table: str, number: int) -> str:
    """An observation of CheXpert's labeler as 0, 1, "" or uncertain.

    Raises:
        DataError: it is none.
    """
    if text not in VALUES:
        raise DataError(f"{table}: row {number} holds a value that is none of 1, 0, -1 and blank")
    return VALUES[text]


def _image(holders: Sequence[Path], path: str) -> Path | None:
    """Paths begin with the data set's own folder, which may have been renamed; batches of the full set lack `train`."""
    parts = PurePosixPath(path).parts
    if ".." in parts or path.startswith("/"):
        return None
    places = (folder.joinpath(*parts[start:]) for folder in holders for start in (1, 0, 2))
    return next((place for place in places if place.is_file()), None)


def _view(row: Cells) -> str:
    return row.get("AP/PA") or ("LATERAL" if row.get("Frontal/Lateral") == "Lateral" else "")
