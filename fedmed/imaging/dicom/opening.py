"""Opening a DICOM file without being made to spend memory: long values wait on disk until somebody asks for them."""

from __future__ import annotations

import io
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.pixels import FLOATS, LONGEST_VALUE, UNDEFINED, Declared, claims_of, declared

PREAMBLE = 128  # bytes before "DICM" (PS3.10 7.1)
HEADER_BYTES = 8 * 2**20  # of a deflated file, inflated before its header has said how long it is
LONG_LENGTH = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's preamble (PS3.10 7.1), or begins with what would follow it.

    That is file meta information, or where this is missing too, the object itself.

    Raises:
        OSError: it cannot be read.
        UnreadableImage: it is a device or a pipe.
    """
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise UnreadableImage("not a regular file")
    with path.open("rb") as file:
        return _header_start(file) is not None


def open_dicom(path: Path) -> Dataset:
    """An object with its header checked and its pixels not yet read.

    Values above a mebibyte, the pixels among them, are read from the file when they are first used. If there are
    pixels, the header's claims about them have been checked against each other and against the file's length.

    Raises:
        UnreadableImage: the claims are impossible, or the file inflates to far more than it declares.
        Exception: whatever pydicom raises; see `plain_errors`.
    """
    with path.open("rb") as file:
        start = _header_start(file)
        if start is None:
            raise UnreadableImage("neither DICOM, PNG nor JPEG")
        syntax, end = _transfer_syntax(file, start)
        if syntax == DeflatedExplicitVRLittleEndian:
            file.seek(end)
            return _inflated(file.read(), syntax)
    ds = pydicom.dcmread(path, defer_size=LONGEST_VALUE, force=start == 0)
    if start == 0 and not ds.file_meta:
        implicit, _ = ds.original_encoding
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    keywords = [keyword for keyword in ("PixelData", *FLOATS) if keyword in ds]
    if keywords:
        _check_room(ds, declared(ds), path.stat().st_size)
    return ds


def _header_start(file: BinaryIO) -> int | None:
    """Where file meta information begins, or the object if there is none; None if the file is no DICOM."""
    beginning = file.read(PREAMBLE + 4)
    if beginning[PREAMBLE:] == b"DICM":
        return PREAMBLE + 4
    headless = beginning[:2] == b"\x02\x00" and beginning[2:4] in (b"\x00\x00", b"\x10\x00")
    return 0 if (headless and beginning[4:6] in (b"UL", b"UI")) or _is_bare(beginning) else None


def _is_bare(beginning: bytes) -> bool:
    """Whether two elements of group 0008 stand there in order, as in an object that was stored alone (PS3.5 7.1)."""
    place, elements = 0, []
    for _ in range(2):
        head = beginning[place : place + 8]
        if len(head) < 8 or head[:2] != b"\x08\x00":
            return False
        explicit = head[4:6].isalpha() and head[4:6].isupper()
        elements.append(int.from_bytes(head[2:4], "little"))
        place += 8 + int.from_bytes(head[6:8] if explicit else head[4:8], "little")
    return elements[0] < elements[1]


def _transfer_syntax(file: BinaryIO, start: int) -> tuple[str, int]:
    """Transfer Syntax UID (0002,0010) and where the data set begins; file meta is Explicit VR Little Endian (7.1)."""
    syntax, place = "", start
    while True:
        file.seek(place)
        head = file.read(12)
        if len(head) < 12 or head[:2] != b"\x02\x00":
            return syntax, place
        wide = head[4:6] in LONG_LENGTH
        length = int.from_bytes(head[8:12] if wide else head[6:8], "little")
        place += 12 if wide else 8
        if head[2:4] == b"\x10\x00":
            file.seek(place)
            syntax = file.read(min(length, 64)).rstrip(b"\0 ").decode("ascii", "replace")
        place += length


def _check_room(ds: Dataset, claims: Declared, file_bytes: int) -> None:
    """Pixels of undefined length (compressed ones) end with the file at the latest."""
    element = ds.get_item(claims.keyword, keep_deferred=True)
    if not isinstance(element, RawDataElement) or element.length != UNDEFINED or element.value is not None:
        return
    if file_bytes - element.value_tell > 2 * claims.frame_bytes * claims.frames + LONGEST_VALUE:
        raise UnreadableImage("more pixel data than its header declares")


def _inflated(zipped: bytes, syntax: str) -> Dataset:
    """A deflated data set (PS3.5 A.5). A kilobyte can inflate to a megabyte, so no more than declared is inflated."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(zipped, HEADER_BYTES)
    if not inflater.eof and inflater.unconsumed_tail:
        head, pixels = _parsed(plain, syntax, to_pixels=True)
        if not pixels:
            raise UnreadableImage("header longer than any image's")
        claims = claims_of(head, pixels)
        room = 2 * claims.frame_bytes * claims.frames + LONGEST_VALUE
        plain += inflater.decompress(inflater.unconsumed_tail, room)
        if not inflater.eof and inflater.unconsumed_tail:
            raise UnreadableImage("more pixel data than its header declares")
    if not inflater.eof:
        raise UnreadableImage("truncated file")
    return _parsed(plain, syntax, to_pixels=False)[0]


def _parsed(plain: bytes, syntax: str, *, to_pixels: bool) -> tuple[Dataset, str]:
    """A data set and the keyword of its pixels, at which reading stops if `to_pixels`."""
    found = ""

    def at_pixels(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        nonlocal found
        found = PIXELS.get(int(tag), found)
        return to_pixels and bool(found)

    try:
        ds = read_dataset(io.BytesIO(plain), is_implicit_VR=False, is_little_endian=True, stop_when=at_pixels)
    except EOFError:
        raise UnreadableImage("truncated file") from None
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    return ds, found
