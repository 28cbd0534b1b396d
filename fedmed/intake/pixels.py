"""What hides beside the pixels in the element that holds them: comments of a codec, bits that no value uses, padding.

The values that a decoder gives stay the same, and so does every byte where nothing hides.
"""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import RLELossless

from fedmed.imaging.dicom.pixels import Declared, declared

JPEG_START, JPEG_2000_START = b"\xff\xd8", b"\xff\x4f"
JPEG_TEXT = {0xFE, *range(0xE1, 0xE8), *range(0xE9, 0xEE), 0xEF}  # COM and APPn; 0, 8 and 14 say how colours are read
JPEG_2000_TEXT = {0x64}  # COM (ISO 15444-1 A.9.2)
JPEG_ENDS, JPEG_2000_ENDS = {0xDA, 0xD9}, {0x90, 0x93, 0xD9}  # start of scan, of tile part, of data; end
ALONE = {0x01, 0x4F, *range(0xD0, 0xD9)}  # markers without a length


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
    if claims.allocated in (16, 32) and claims.stored < claims.allocated:
        data = _without_unused_bits(data, claims)
    dataset.PixelData = data


def _without_unused_bits(data: bytes, claims: Declared) -> bytes:
    """Old overlays lie in the bits of a cell that no value uses (PS3.5 8.1.1, retired), and show text.

    Bits above a negative value repeat its sign.
    """
    kind = f"{'<' if claims.syntax.is_little_endian else '>'}{'i' if claims.signed else 'u'}{claims.allocated // 8}"
    cells = np.frombuffer(data, kind)
    above, below = claims.allocated - 1 - claims.high, claims.high + 1 - claims.stored
    with np.errstate(all="ignore"):
        clean = np.right_shift(np.left_shift(cells, above), above + below)
    return bytes(np.left_shift(clean, below).astype(kind))


def _clean_frames_(dataset: Dataset, claims: Declared) -> None:
    """Compressed frames whose headers hold text are written anew with blanks in its place."""
    if claims.syntax == RLELossless:
        return
    offsets = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=claims.frames, extended_offsets=offsets))
    clean = [_without_comments(frame) for frame in frames]
    if clean == frames:
        return
    dataset.PixelData = encapsulate(clean)
    for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if keyword in dataset:
            del dataset[keyword]


def _without_comments(frame: bytes) -> bytes:
    """The same codestream with zeros in the segments of its header that hold text; lengths stay."""
    if frame[:2] == JPEG_START:
        text, ends, place = JPEG_TEXT, JPEG_ENDS, 2
    elif (place := frame.find(JPEG_2000_START + b"\xff\x51", 0, 4096)) >= 0:
        text, ends, place = JPEG_2000_TEXT, JPEG_2000_ENDS, place + 2
    else:
        return frame
    clean = bytearray(frame)
    while place + 4 <= len(clean) and clean[place] == 0xFF and clean[place + 1] not in ends:
        marker, length = clean[place + 1], int.from_bytes(clean[place + 2 : place + 4])
        if marker == 0xFF or marker in ALONE:  # fill bytes
            place += 1 if marker == 0xFF else 2
            continue
        if marker in text:
            first = place + 4 + (2 if text is JPEG_2000_TEXT else 0)  # Rcom says what kind of text it is
            clean[first : place + 2 + length] = bytes(max(0, min(place + 2 + length, len(clean)) - first))
        place += 2 + length
    return bytes(clean)
