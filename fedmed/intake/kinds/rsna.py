"""RSNA Pneumonia Detection (Shih et al. 2019, doi:10.1148/ryai.2019180041): lung opacity, from boxes of radiologists.

Its images were drawn from NIH ChestX-ray14: a federation with both has some patients twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.found import Found, Unmatched, files_by_stem, leftovers, the_file, with_header
from fedmed.intake.tables import table_rows

LABEL = "Lung Opacity"


def rsna(source: Path) -> Iterator[Found | Unmatched]:
    """The DICOM images below a folder that holds `stage_2_train_labels.csv` (one row a box) too.

    Every image is a patient of its own, as in the set; view, age and sex come from its header.

    Raises:
        DataError: there is no such table, or it has other columns.
    """
    table = the_file(source, "stage_2_train_labels.csv", "stage_2_train_labels.csv.gz")
    pictures = files_by_stem(source, (".dcm",))
    opacity: dict[str, tuple[int, str]] = {}  # patient -> its first row, target
    for number, row in table_rows(table):
        try:
            patient, target = row["patientId"], str(int(float(row["Target"])))
        except (KeyError, ValueError):
            raise DataError(f"{table.name}: row {number}: not RSNA's columns patientId and Target") from None
        first, before = opacity.get(patient, (number, "0"))
        opacity[patient] = first, max(before, target)
    for patient, (number, target) in opacity.items():
        picture = pictures.pop(patient, None)
        if picture is None:
            yield Unmatched(what="row without image", place=f"row {number}")
        else:
            yield with_header(Found(patient=patient, images=(Path(picture),), labels={LABEL: target}))
    yield from leftovers(source, pictures, "image without row")
