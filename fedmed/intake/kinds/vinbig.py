"""VinDr-CXR, also VinBigData (Nguyen et al. 2022, arXiv:2012.15029): boxes of three radiologists an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.found import PICTURES, Found, Unmatched, files_by_stem, leftovers, the_file, with_header
from fedmed.intake.tables import table_rows

NOTHING = "No finding"
MAJORITY = 2  # of the three radiologists who saw each image


def vinbig(source: Path) -> Iterator[Found | Unmatched]:
    """The images below a folder that holds `train.csv` too, or PhysioNet's `annotations/annotations_train.csv`.

    A finding is there when two of three radiologists drew it. The set names no patients, so that every image is one of
    its own.

    Raises:
        DataError: there is no such table, or it has other columns.
    """
    table = the_file(source, "train.csv", "train.csv.gz", "annotations/annotations_train.csv", "annotations_train.csv")
    pictures = files_by_stem(source, (".dicom", ".dcm", *PICTURES))
    first: dict[str, int] = {}
    readers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # image -> finding -> who
    names: set[str] = set()
    for number, row in table_rows(table):
        try:
            image, finding, reader = row["image_id"], row["class_name"], row["rad_id"]
        except KeyError:
            raise DataError(f"{table.name}: not VinBig's columns image_id, class_name and rad_id") from None
        first.setdefault(image, number)
        readers[image][finding].add(reader)
        names.add(finding)
    findings = sorted(names - {NOTHING})
    for image, number in first.items():
        picture = pictures.pop(image, None)
        if picture is None:
            yield Unmatched(what="row without image", place=f"row {number}")
            continue
        votes = readers[image]
        labels = {finding: str(int(len(votes[finding]) >= MAJORITY)) for finding in findings}
        yield with_header(Found(patient=image, images=(Path(picture),), labels=labels))
    yield from leftovers(source, pictures.values(), "image without row")
