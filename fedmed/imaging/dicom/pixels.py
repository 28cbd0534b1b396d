"""The header's claims about the pixels, checked before anything is decoded, and the stored values themselves."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForProcessing, RLELossless

from fedmed.errors import UnreadableImage

MAX_PIXEL_BYTES = 512 * 2**20  # decoded; a mammogram has 50 MB, and a header can claim anything
NEEDED = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PhotometricInterpretation",
)  # Type 1 in the Image Pixel module (PS3.3 C.7.6.3)


def check_header(ds: Dataset, *, samples: int) -> None:
    """Refuse what cannot be one picture of `samples` channels.

    Raises:
        UnreadableImage: with a reason that names neither patient nor file.
    """
    if "PixelData" not in ds:
        raise UnreadableImage(
            "no pixels" if "FloatPixelData" not in ds and "DoubleFloatPixelData" not in ds else "floating-point pixels"
        )
    missing = [keyword for keyword in NEEDED if ds.get(keyword) is None]
    if missing:
        raise UnreadableImage(f"header lacks {missing[0]}")
    if ds.get("SOPClassUID") == DigitalXRayImageStorageForProcessing:
        raise UnreadableImage("raw detector data, DX for processing")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise UnreadableImage("multi-frame")
    if int(ds.SamplesPerPixel) != samples:
        raise UnreadableImage("colour image" if samples == 1 else "grey image")
    allocated, stored, high = int(ds.BitsAllocated), int(ds.BitsStored), int(ds.HighBit)
    if allocated not in (8, 16, 32) or not 1 <= stored <= min(allocated, 16) or not stored - 1 <= high < allocated:
        raise UnreadableImage("impossible bit depth")
    if int(ds.PixelRepresentation) not in (0, 1):
        raise UnreadableImage("impossible pixel representation")
    size = int(ds.Rows) * int(ds.Columns) * samples * allocated // 8
    if size == 0:
        raise UnreadableImage("no rows or columns")
    if size > MAX_PIXEL_BYTES:
        raise UnreadableImage(f"larger than {MAX_PIXEL_BYTES >> 20} MiB")
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated and len(ds.PixelData) < size:
        raise UnreadableImage("truncated pixels")


def stored_values(ds: Dataset) -> NDArray[Any]:
    """The grey pixels as the scanner stored them: sign extended, foreign bits removed (C.7.6.3.1.4).

    Returns:
        (H, W) integers.

    Raises:
        UnreadableImage: see `check_header`, or the photometric interpretation is no grey.
    """
    check_header(ds, samples=1)
    if ds.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnreadableImage("not a grey image")
    pixels = ds.pixel_array
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:
        return pixels  # JPEG codecs carry the value, not the cell
    return significant_bits(pixels, stored=int(ds.BitsStored), high=int(ds.HighBit))


def significant_bits(pixels: NDArray[Any], *, stored: int, high: int) -> NDArray[Any]:
    """The `stored` bits that end at bit `high` of each cell, as a number of the cell's sign.

    Old files keep overlays (60xx) in the other bits.
    """
    width = pixels.dtype.itemsize * 8
    if stored == width:
        return pixels
    cells = pixels << (width - 1 - high)  # drops what lies above; the sign bit is now on top
    return cells >> (width - stored)  # arithmetic for signed types: extends the sign
