"""What hides beside the pixels in the element that holds them: comments of a codec, bits that no value uses, padding.

The values that a decoder gives stay the same, and so does every byte where nothing hides.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from fedmed.imaging.dicom.codestream import coded_size
from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.dicom.pixels import Declared, declared

JPEG_START, JPEG_2000_START, JP2_START = b"\xff\xd8", b"\xff\x4f\xff\x51", b"jP  "
JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # of a segment: within scans no such bytes occur
JPEG_TEXT = {0xFE, *range(0xE1, 0xE8), *range(0xE9, 0xEE), 0xEF}  # COM and APPn; 0, 8 and 14 say how colours are read
END, JPEG_2000_COMMENT, TILE_PART, DATA = 0xD9, 0x64, 0x90, 0x93  # EOI and EOC; COM, SOT, SOD (ISO 15444-1 A.2)
BLOCK = 2**20  # bytes of cells that are cleaned at once
CODESTREAM = b"jp2c"
BOXES = (JP2_START, b"ftyp", b"jp2h")  # of JP2, that a reader needs


def cleaned_pixels_(dataset: Dataset) -> None:
    """Blank what is no picture in the pixels of an object, in place.

    Raises:
        UnreadableImage: the header's claims about them are impossible.
    """
    if "PixelData" not in dataset:
        return
    claims = declared(dataset)
    if claims.syntax.is_encapsulated:
        _clean_frames_(dataset, claims)
        return
    data = bytes(dataset.PixelData)[: claims.stored_bytes + claims.stored_bytes % 2]
    if claims.stored < claims.allocated:
        data = _without_unused_bits(data, claims)
    dataset.PixelData = data


def may_hide_bits(dataset: Dataset) -> bool:
    """Whether pixels are compressed, so that `cleaned_pixels_` left their cells, and have bits that no value uses."""
    if "PixelData" not in dataset:
        return False
    claims = declared(dataset)
    return claims.syntax.is_encapsulated and claims.stored < claims.allocated


def blanked_cells(path: Path) -> bytes | bytearray:
    """The decoded cells of an object that `may_hide_bits`, those bits blanked; nothing if none of them was set.

    A lossless codec keeps whole cells, and so what lies in their unused bits (RLE does; JPEG if its own precision says
    so). For the process that decodes.

    Raises:
        UnreadableImage: no decoder reads them.
    """
    dataset = open_dicom(path)
    claims = declared(dataset)
    if claims.syntax != RLELossless and not any(coded_size(frame).bits > claims.stored for frame in _frames(dataset)):
        return b""
    dataset.BitsStored, dataset.HighBit = claims.allocated, claims.allocated - 1
    cells, hidden = bytearray(), False
    for frame in stored_frames(dataset):  # one at a time: the whole may be large
        data = frame.tobytes()
        clean = _without_unused_bits(data, claims)
        cells += clean
        hidden = hidden or clean is not data
    return cells if hidden else b""


def put_cells_(dataset: Dataset, cells: bytes) -> None:
    """Give an object the cells of its `blanked_cells`, without compression; in colour they are RGB."""
    _drop_offsets_(dataset)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if dataset.SamplesPerPixel > 1:
        dataset.PhotometricInterpretation, dataset.PlanarConfiguration = "RGB", 0
    dataset.PixelData = cells + b"\0" * (len(cells) % 2)
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
    dataset["PixelData"].is_undefined_length = False


def _without_unused_bits(data: bytes, claims: Declared) -> bytes:
    """Old overlays lie in the bits of a cell that no value uses (PS3.5 8.1.1, retired), and show text.

    Bits above a negative value repeat its sign. Where nothing hides, the same bytes come back: the whole may be large.
    """
    whole = memoryview(data)
    blocks = [whole[first : first + BLOCK] for first in range(0, len(whole), BLOCK)]
    clean = [_clean_cells(block, claims) for block in blocks]
    return data if all(one is other for one, other in zip(clean, blocks, strict=True)) else b"".join(clean)


def _clean_cells(block: memoryview, claims: Declared) -> memoryview | bytes:
    """Some cells without their unused bits; the block itself if these hold nothing."""
    kind = f"{'<' if claims.syntax.is_little_endian else '>'}{'i' if claims.signed else 'u'}{claims.allocated // 8}"
    cells = np.frombuffer(block, kind)
    above, below = claims.allocated - 1 - claims.high, claims.high + 1 - claims.stored
    with np.errstate(all="ignore"):
        clean = np.right_shift(np.left_shift(cells, above), above + below)
    clean = np.left_shift(clean, below).astype(kind)
    return block if np.array_equal(clean, cells) else clean.tobytes()


def _clean_frames_(dataset: Dataset, claims: Declared) -> None:
    """Compressed frames whose headers hold text are written anew with blanks in its place."""
    if claims.syntax == RLELossless:
        return
    frames = _frames(dataset)
    clean = [_without_comments(frame) for frame in frames]
    if clean == frames:
        return
    dataset.PixelData = encapsulate(clean)
    _drop_offsets_(dataset)


def _frames(dataset: Dataset) -> list[bytes]:
    """The compressed frames (PS3.5 A.4)."""
    offsets = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    count = declared(dataset).frames
    return list(generate_frames(dataset.PixelData, number_of_frames=count, extended_offsets=offsets))


def _drop_offsets_(dataset: Dataset) -> None:
    for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if keyword in dataset:
            del dataset[keyword]


def _without_comments(frame: bytes) -> bytes:
    """The same frame with zeros in whatever holds text, and without what follows the picture."""
    if frame[:2] == JPEG_START:
        return _clean_jpeg(frame, 2)
    if frame[4:8] == JP2_START:
        return _clean_boxes(frame)
    place = frame.find(JPEG_2000_START, 0, 4096)
    return _clean_jpeg_2000(frame, place) if place >= 0 else frame


def _clean_jpeg(frame: bytes, place: int) -> bytes:
    """Of JPEG and JPEG-LS (ITU-T T.81 B.1.1, T.87 C.2): segments before, between and after scans."""
    clean = bytearray(frame)
    while found := JPEG_MARKER.search(frame, place):
        marker, place = frame[found.start() + 1], found.end()
        if marker == END:
            return _cut(clean, place)
        place = _blank_(clean, place, marker in JPEG_TEXT)
    return bytes(clean)


def _clean_jpeg_2000(frame: bytes, place: int) -> bytes:
    """Of JPEG 2000 (ISO 15444-1 A.2): the main header, and that of each tile part."""
    clean, part = bytearray(frame), 0  # where the next tile part begins, 0 = this one is the last
    place += 2
    while place + 4 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == END:
            return _cut(clean, place + 2)
        if marker == TILE_PART:
            length = int.from_bytes(frame[place + 6 : place + 10])
            part = place + length if length else 0
        if marker == DATA:
            after = part or frame.find(bytes((0xFF, END)), place)
            if after <= place:
                break
            place = after
            continue
        place = _blank_(clean, place + 2, marker == JPEG_2000_COMMENT, kept=2)  # Rcom says what kind of text it is
    return _cut(clean, place + 2) if frame[place : place + 2] == bytes((0xFF, END)) else bytes(clean)


def _clean_boxes(frame: bytes) -> bytes:
    """Of JP2 (ISO 15444-1 I.4): boxes that say how to read the picture stay, and its codestream is cleaned."""
    clean, place = bytearray(frame), 0
    while place + 8 <= len(frame):
        length, kind, first = int.from_bytes(frame[place : place + 4]), frame[place + 4 : place + 8], place + 8
        if length == 1:
            length, first = int.from_bytes(frame[first : first + 8]), first + 8
        end = min(place + length, len(frame)) if length else len(frame)
        if end < first:
            break
        if kind == CODESTREAM:
            clean[first:end] = _clean_jpeg_2000(frame[first:end], 0).ljust(end - first, b"\0")
            return _cut(clean, end)
        elif kind not in BOXES:
            clean[first:end] = bytes(end - first)
        place = end
    return bytes(clean)


def _blank_(clean: bytearray, place: int, text: bool, *, kept: int = 0) -> int:
    """Blank a segment whose length stands at a place, if it is text; where it ends."""
    end = min(place + int.from_bytes(clean[place : place + 2]), len(clean))
    first = min(place + 2 + kept, end)
    if text:
        clean[first:end] = bytes(end - first)
    return max(end, place)


def _cut(clean: bytearray, end: int) -> bytes:
    """Nothing after an end but padding."""
    return bytes(clean[:end] if any(clean[end:]) else clean)
