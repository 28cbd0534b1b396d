"""Which scanners made a data set, from the headers of its DICOM files: for a report that stays at the site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pydicom

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import is_dicom
from fedmed.imaging.manifest import Row
from fedmed.imaging.plain_errors import plain_errors

MOST_HEADERS = 200  # of one data set; a header takes a millisecond, and a hospital has a few scanners
TAGS = ["Manufacturer", "ManufacturerModelName", "Modality"]  # (0008,0070), (0008,1090), (0008,0060)
UNKNOWN = "not said"


def scanners(rows: Sequence[Row]) -> Counter[str]:
    """How many of a data set's images each scanner made, by maker, model and modality.

    Args:
        rows: of a manifest. Of more than `MOST_HEADERS` that many are looked at, evenly spread.

    Returns:
        Counts that add up to the number of images looked at; images that are no DICOM are left out.
    """
    step = max(1, -(-len(rows) // MOST_HEADERS))
    names = (scanner_of(image) for row in rows[::step] for image in row.images)
    return Counter(name for name in names if name is not None)


def scanner_of(image: Path) -> str | None:
    """Maker, model and modality of one image; None if it is no DICOM or cannot be read. Of a series, its first file."""
    try:
        with plain_errors():
            path = min((file for file in image.iterdir() if file.is_file()), default=image) if image.is_dir() else image
            if not path.is_file() or not is_dicom(path):
                return None
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS), force=True)
            maker, model, modality = (" ".join(str(header.get(tag) or "").split())[:64] for tag in TAGS)
    except UnreadableImage:
        return None
    return f"{' '.join(filter(None, (maker, model))) or UNKNOWN}{f' ({modality})' if modality else ''}"
