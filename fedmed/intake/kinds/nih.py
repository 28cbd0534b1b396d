"""NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315): 14 findings, mined from reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.found import PICTURES, Found, Unmatched, files_by_stem, leftovers, stem_of, the_file
from fedmed.intake.persons import sex_of, years
from fedmed.intake.tables import table_rows

LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
NOTHING = "No Finding"
SPLITS = {"train_val_list.txt": "train", "test_list.txt": "test"}  # official, by patient


def nih(source: Path) -> Iterator[Found | Unmatched]:
    """The images below a folder that holds `Data_Entry_2017*.csv` too, and perhaps the official lists.

    Where its cell is blank, nothing is known of an image.

    Raises:
        DataError: there is no such table, or it has other columns or findings.
    """
    table = the_file(source, "Data_Entry_2017*.csv", "Data_Entry_2017*.csv.gz")
    pictures = files_by_stem(source, PICTURES)
    split_of = _splits(source)
    for number, row in table_rows(table):
        try:
            stem = stem_of(row["Image Index"], PICTURES)
            findings, patient = set(filter(None, row["Finding Labels"].split("|"))), row["Patient ID"]
        except KeyError:
            raise DataError(f"{table.name}: not the columns of NIH's Data_Entry_2017") from None
        if not findings <= {*LABELS, NOTHING}:
            raise DataError(f"{table.name}: row {number} has a finding that is none of NIH's")
        picture = pictures.pop(stem, None)
        if picture is None:
            yield Unmatched(what="row without image", place=f"row {number}")
            continue
        yield Found(
            patient=patient,
            images=(Path(picture),),
            labels={label: str(int(label in findings)) if findings else "" for label in LABELS},
            view=row.get("View Position", ""),
            age=years(row.get("Patient Age", "")),
            sex=sex_of(row.get("Patient Gender", "")),
            split=split_of.get(stem, ""),
        )
    yield from leftovers(source, pictures.values(), "image without row")


def _splits(source: Path) -> dict[str, str]:
    """The split of every image that the official lists name, if both are there: a half of them would be none."""
    if not all((source / name).is_file() for name in SPLITS):
        return {}
    return {
        stem_of(line.strip(), PICTURES): split
        for name, split in SPLITS.items()
        for line in (source / name).read_text(encoding="utf-8").splitlines()
    }
