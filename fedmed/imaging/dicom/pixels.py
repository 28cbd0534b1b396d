"""The header's claims about the pixels, checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import UID

from fedmed.errors import UnreadableImage

MAX_FRAME_BYTES = 512 * 2**20  # decoded; a mammogram has 50 MB, and a header can claim anything
MAX_OBJECT_BYTES = 4 * 2**30  # decoded, all frames; an enhanced CT of 4000 slices has 2 GB
LONGEST_VALUE = 2**20  # bytes read at once; pixels may take twice the declared bytes and so many more
UNDEFINED = 0xFFFFFFFF  # a length, PS3.5 7.1.1
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
INTEGERS_ONLY = ("BitsStored", "HighBit", "PixelRepresentation")
FLOATS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}  # bits; have neither BitsStored nor a sign (C.7.6.24)


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a header says that the pixels are (PS3.3 C.7.6.3)."""

    keyword: str  # of the element that holds them
    rows: int
    columns: int
    samples: int
    frames: int
    allocated: int  # bits of a cell
    stored: int  # bits of a value in its cell
    high: int  # the cell's bit that is the value's highest
    signed: bool
    photometric: str
    syntax: UID

    @property
    def frame_bytes(self) -> int:
        """Of one decoded frame; a frame of single bits is decoded to bytes."""
        return self.rows * self.columns * self.samples * max(8, self.allocated) // 8

    @property
    def stored_bytes(self) -> int:
        """Of all frames without compression; half the colours of YBR_FULL_422 are left out (C.7.6.3.1.2)."""
        bits = self.rows * self.columns * self.samples * self.allocated * self.frames
        return (bits * 2 // 3 if self.photometric == "YBR_FULL_422" else bits) // 8


def declared(ds: Dataset) -> Declared:
    """The header's claims about the pixels that are there.

    The length of the pixels is compared with them without reading a byte that is still on disk.

    Raises:
        UnreadableImage: there are no pixels, or too few; and see `claims_of`.
    """
    keywords = [keyword for keyword in ("PixelData", *FLOATS) if keyword in ds]
    if len(keywords) != 1:
        raise UnreadableImage("pixels of two kinds" if keywords else "no pixels")
    claims = claims_of(ds, keywords[0])
    _check_length(ds, claims)
    return claims


def claims_of(ds: Dataset, keyword: str) -> Declared:
    """The header's claims, refused where no decoder could fulfil them.

    Args:
        ds: the object, with or without its pixels.
        keyword: of the element that holds them.

    Raises:
        UnreadableImage: with a reason that names neither patient nor file.
    """
    if "TransferSyntaxUID" not in getattr(ds, "file_meta", {}):
        raise UnreadableImage("header lacks TransferSyntaxUID")
    if not ds.file_meta.TransferSyntaxUID.is_transfer_syntax or ds.file_meta.TransferSyntaxUID.is_private:
        raise UnreadableImage("no decoder for its transfer syntax")
    floating = FLOATS.get(keyword)
    for name in NEEDED:
        if ds.get(name) is None and not (floating and name in INTEGERS_ONLY):
            raise UnreadableImage(f"header lacks {name}")
    claims = Declared(
        keyword=keyword,
        rows=int(ds.Rows),
        columns=int(ds.Columns),
        samples=int(ds.SamplesPerPixel),
        frames=_frames(ds),
        allocated=int(ds.BitsAllocated),
        stored=floating or int(ds.BitsStored),
        high=floating - 1 if floating else int(ds.HighBit),
        signed=not floating and _signed(ds),
        photometric=str(ds.PhotometricInterpretation),
        syntax=ds.file_meta.TransferSyntaxUID,
    )
    _check_claims(claims)
    return claims


def check_single(claims: Declared) -> None:
    """Refuse several frames where one picture is wanted."""
    if claims.frames > 1:
        raise UnreadableImage('multi-frame; data.items = "slices" or "volumes" reads it')


def check_grey(claims: Declared) -> None:
    """Refuse whatever is not one channel of integers from black to white."""
    if claims.samples != 1:
        raise UnreadableImage("colour image")
    if claims.keyword != "PixelData":
        raise UnreadableImage("floating-point pixels")
    if claims.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnreadableImage("not a grey image")
    if claims.allocated not in (8, 16, 32):
        raise UnreadableImage("impossible bit depth")


def significant_bits(pixels: NDArray[Any], *, stored: int, high: int) -> NDArray[Any]:
    """The `stored` bits that end at bit `high` of each cell, as a number of the cell's sign (C.7.6.3.1.4, PS3.5 8.1.1).

    Old files keep overlays (60xx) in the other bits.
    """
    width = pixels.dtype.itemsize * 8
    if stored == width:
        return pixels
    cells = pixels << (width - 1 - high)  # drops what lies above; the sign bit is now on top
    cells >>= width - stored  # arithmetic for signed types: extends the sign
    return cells


def _frames(ds: Dataset) -> int:
    try:
        frames = int(ds.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        raise UnreadableImage("impossible number of frames") from None
    if frames < 1:
        raise UnreadableImage("impossible number of frames")
    return frames


def _signed(ds: Dataset) -> bool:
    if int(ds.PixelRepresentation) not in (0, 1):
        raise UnreadableImage("impossible pixel representation")
    return int(ds.PixelRepresentation) == 1


def _check_claims(claims: Declared) -> None:
    allocated = claims.allocated
    if allocated not in (1, 8, 16, 32, 64) or not claims.stored - 1 <= claims.high < allocated or claims.stored < 1:
        raise UnreadableImage("impossible bit depth")
    if claims.samples not in (1, 3, 4):
        raise UnreadableImage("impossible number of samples per pixel")
    if claims.frame_bytes == 0:
        raise UnreadableImage("no rows or columns")
    if claims.frame_bytes > MAX_FRAME_BYTES:
        raise UnreadableImage(f"larger than {MAX_FRAME_BYTES >> 20} MiB")
    if claims.frame_bytes * claims.frames > MAX_OBJECT_BYTES:
        raise UnreadableImage(f"all frames together larger than {MAX_OBJECT_BYTES >> 20} MiB")


def _check_length(ds: Dataset, claims: Declared) -> None:
    """Stored bytes against declared ones: too few are no picture, and far too many are only meant to fill memory."""
    element = ds.get_item(claims.keyword, keep_deferred=True)
    if element.value is None and isinstance(element, RawDataElement):  # still on disk
        if element.length == UNDEFINED:
            return  # compressed: `opening` compares it with what is left of the file
        length = int(element.length)
    else:
        length = len(element.value or b"")
    if not claims.syntax.is_encapsulated and length < claims.stored_bytes:
        raise UnreadableImage("truncated pixels")
    if length > 2 * claims.frame_bytes * claims.frames + LONGEST_VALUE:
        raise UnreadableImage("more pixel data than its header declares")
