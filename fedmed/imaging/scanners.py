"""Which scanners made images, from the headers of DICOM files. No serial number, no station name.

Maker and model are of PS3.3 C.7.5.1 General Equipment, the form of the pixels of C.7.6.3 Image Pixel.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pydicom

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import is_dicom
from fedmed.imaging.manifest import Row
from fedmed.imaging.plain_errors import plain_errors

MOST_HEADERS = 200  # of one data set; a header takes a millisecond, and a hospital has a few scanners
UNKNOWN = "not said"
KIND = ("Manufacturer", "ManufacturerModelName", "PhotometricInterpretation", "BitsStored")
NAME = ("Manufacturer", "ManufacturerModelName", "Modality")


def scanner_digest(image: Path) -> str:
    """A digest that is equal for images of one kind of scanner: maker, model, photometric interpretation and bits.

    The values themselves stay in the file: a digest is all that is compared, and nothing of it is shown.

    Args:
        image: a DICOM file, or the folder of a series, of which the first file by name speaks.

    Returns:
        A digest; that of the file's ending where the image is no DICOM.

    Raises:
        UnreadableImage: it cannot be read.
    """
    with plain_errors():
        path = _first_file(image)
        values = _header(path, KIND) or ("", "", "", "".join(path.suffixes))
    return hashlib.sha256(json.dumps([value.casefold() for value in values]).encode()).hexdigest()


def scanner_counts(rows: Sequence[Row]) -> Counter[str]:
    """How many of a data set's images each scanner made, by maker, model and modality.

    Args:
        rows: of a manifest. Of more than `MOST_HEADERS` that many are looked at, evenly spread.

    Returns:
        Counts that add up to the number of images looked at; images that are no DICOM are left out.
    """
    step = max(1, -(-len(rows) // MOST_HEADERS))
    names = (scanner_name(image) for row in rows[::step] for image in row.images)
    return Counter(name for name in names if name is not None)


def scanner_name(image: Path) -> str | None:
    """Maker, model and modality of one image; None if it is no DICOM or cannot be read. Of a series, its first file."""
    try:
        with plain_errors():
            values = _header(_first_file(image), NAME)
    except UnreadableImage:
        return None
    if values is None:
        return None
    maker, model, modality = (value[:64] for value in values)
    return f"{' '.join(filter(None, (maker, model))) or UNKNOWN}{f' ({modality})' if modality else ''}"


def _first_file(image: Path) -> Path:
    return min(each for each in image.iterdir() if each.is_file()) if image.is_dir() else image


def _header(path: Path, keywords: Sequence[str]) -> tuple[str, ...] | None:
    """Elements of a DICOM file, "" where one is missing; None of other files."""
    if not is_dicom(path):
        return None
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(keywords), force=True)
    return tuple(" ".join(str(header.get(keyword) or "").split()) for keyword in keywords)
