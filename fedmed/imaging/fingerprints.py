"""What a picture shows, as a digest that survives a new export: of the decoded pixels, and of nothing in a header.

The same picture under another name, pseudonym or lossless transfer syntax has the same fingerprint; a resized, cropped
or lossily compressed copy has another one. A fingerprint keeps no secret: whoever has the picture can compute it, so it
is only ever kept under a site's key (`fedmed.privacy.cohort`). This runs in the process that decodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.raster import raster

BYTES = 32


def fingerprints(path: Path) -> NDArray[np.uint8]:
    """The fingerprints of all frames or slices of what a manifest may name as an image.

    Args:
        path: a picture, a DICOM object, the folder of a series, or a NIfTI.

    Returns:
        (n, 32), in order, each once. A frame of one value, which many patients could share, has none.

    Raises:
        UnreadableImage: nothing of it can be decoded.
    """
    with plain_errors():
        found = sorted({_fingerprint(frame) for frame in _frames(path) if frame.size and frame.min() != frame.max()})
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, BYTES)


def _frames(path: Path) -> Iterator[NDArray[Any]]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and is_dicom(file))
        if not files:
            raise UnreadableImage("no DICOM file in its folder")
        for file in files:
            ds = open_dicom(file)
            if "PixelData" in ds:  # else it is a report or a segmentation's neighbour, and no slice
                yield from stored_frames(ds)
    elif is_dicom(path):
        yield from stored_frames(open_dicom(path))
    else:
        try:
            yield raster(path, upright=False)  # a copy without EXIF data is the same picture
        except (OSError, SyntaxError):  # Pillow's word for another format
            from fedmed.imaging.volumes.nifti import read_nifti  # heavy: nibabel

            yield from read_nifti(path).values


def _fingerprint(frame: NDArray[Any]) -> bytes:
    """SHA-256 over the shape and the values, in one type whatever the file stores them in."""
    whole = frame.dtype.kind in "bui"
    values = np.ascontiguousarray(frame, "<i8" if whole else "<f4")
    return hashlib.sha256(f"{frame.shape} {'i' if whole else 'f'} ".encode() + values.tobytes()).digest()
