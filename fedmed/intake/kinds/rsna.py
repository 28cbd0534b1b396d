"""RSNA Pneumonia Detection (Shih et al. 2019, doi:10.1148/ryai.2019180041): lung opacity, from boxes of radiologists.

Its images were drawn from NIH ChestX-ray14: a federation with both has some patients twice. Whose they are there
stands in a file that RSNA publishes beside the set, `MAPPING`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.found import Found, Unmatched, files_by_stem, leftovers, the_file, with_header
from fedmed.intake.tables import table_rows

LABEL = "Lung Opacity"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"


def rsna(source: Path) -> Iterator[Found | Unmatched]:
    """The DICOM images below a folder that holds `stage_2_train_labels.csv` (one row a box) too.

    With RSNA's mapping in that folder, patients are those of NIH; without, every image is a patient of its own, as in
    the set, although some people have several. View, age and sex come from the header.

    Raises:
        DataError: there is no such table, or it or the mapping has another form.
    """
    table = the_file(source, "stage_2_train_labels.csv", "stage_2_train_labels.csv.gz")
    pictures = files_by_stem(source, (".dcm",))
    patient_of = _patients(source)
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
            person = patient_of.get(patient, patient)
            yield with_header(Found(patient=person, images=(Path(picture),), labels={LABEL: target}))
    yield from leftovers(source, pictures.values(), "image without row")


def _patients(source: Path) -> dict[str, str]:
    """The patient of NIH's whom an image shows: the number that NIH's name of it begins with."""
    path = source / MAPPING
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {entry["subset_img_id"]: str(int(entry["img_id"].partition("_")[0])) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{MAPPING}: not RSNA's mapping, a list of subset_img_id and img_id") from None
