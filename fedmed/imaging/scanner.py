"""Which kind of scanner made an image, for dealing images to virtual hospitals as scanners would."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pydicom

from fedmed.imaging.dicom.opening import is_dicom
from fedmed.imaging.plain_errors import plain_errors

# Device and pixel form: PS3.3 C.7.5.1 General Equipment and C.7.6.3 Image Pixel. No serial number, no station name.
KEYWORDS = ("Manufacturer", "ManufacturerModelName", "PhotometricInterpretation", "BitsStored")


def scanner_digest(path: Path) -> str:
    """A digest that is equal for images of one kind of scanner: maker, model, photometric interpretation and bits.

    The values themselves stay in the file: a digest is all that is compared, and nothing of it is shown.

    Args:
        path: a DICOM file, or the folder of a series, of which the first file by name speaks.

    Returns:
        A digest; that of the file's ending where the image is no DICOM.

    Raises:
        UnreadableImage: it cannot be read.
    """
    with plain_errors():
        if path.is_dir():
            path = min(each for each in path.iterdir() if each.is_file())
        if is_dicom(path):
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(KEYWORDS), force=True)
            values = [" ".join(str(header.get(keyword) or "").split()).casefold() for keyword in KEYWORDS]
        else:
            values = ["", "", "", "".join(path.suffixes).casefold()]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()
