"""What a compressed frame says of itself, read from its own first bytes.

Decoders allocate what the codestream asks for, not what the DICOM header says. A file of two kilobytes can ask for
gigabytes, so both are compared before any decoder sees the frame.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydicom.uid import JPEGExtended12Bit, JPEGLSLossless, JPEGLSNearLossless, RLELossless

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.pixels import Declared

FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 (ISO 10918-1 B.1.1.3), JPEG-LS SOF55
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
SCAN, END = 0xDA, 0xD9  # markers SOS and EOI
NEED_END = (JPEGExtended12Bit, JPEGLSLossless, JPEGLSNearLossless)  # libjpeg fills up, CharLS searches for seconds
MAX_TILES = 65535  # ISO 15444-1 A.4.2


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Size of a coded frame."""

    rows: int
    columns: int
    samples: int
    bits: int  # of one sample


def check_codestream(frame: bytes, claims: Declared) -> None:
    """Refuse a frame whose own header asks for another picture than the DICOM header declares.

    Raises:
        UnreadableImage: it does, or the frame is no codestream at all.
    """
    if claims.syntax == RLELossless:
        _check_rle(frame, claims)
        return
    coded = coded_size(frame)
    if claims.syntax in NEED_END and b"\xff\xd9" not in frame[-16:]:  # end of image, and padding
        raise UnreadableImage("truncated compressed pixels")
    if (coded.rows, coded.columns) != (claims.rows, claims.columns) or coded.samples != claims.samples:
        raise UnreadableImage("compressed pixels of another size than the header's")
    if coded.bits > claims.allocated:
        raise UnreadableImage("compressed pixels with more bits than the header's")


def coded_size(frame: bytes) -> Coded:
    """Size and depth of a JPEG, JPEG-LS or JPEG 2000 codestream.

    Raises:
        UnreadableImage: it is none of these, or ends too early.
    """
    try:
        if frame[:2] == b"\xff\xd8":
            return _jpeg(frame)
        return _jpeg_2000(frame, _codestream_start(frame))
    except IndexError:
        raise UnreadableImage("truncated compressed pixels") from None


def _jpeg(frame: bytes) -> Coded:
    """ISO 10918-1 B.2: marker segments, one directly after the other, up to the first scan.

    All are walked, not only those before the frame header: GDCM aborts the process where one has a wrong length.
    """
    place, coded = 2, None
    while True:
        if frame[place] != 0xFF:
            raise UnreadableImage("damaged compressed pixels")
        while frame[place + 1] == 0xFF:  # fill bytes
            place += 1
        marker = frame[place + 1]
        if marker == SCAN and coded is not None:
            return coded
        if marker in ALONE:
            place += 2
            continue
        length = _number(frame, place + 2, 2)
        if marker in (SCAN, 0, END) or length < 2 or (marker in FRAME_HEADERS and coded is not None):
            raise UnreadableImage("damaged compressed pixels")
        if marker in FRAME_HEADERS:
            coded = Coded(
                rows=_number(frame, place + 5, 2),
                columns=_number(frame, place + 7, 2),
                samples=frame[place + 9],
                bits=frame[place + 4],
            )
        place += 2 + length


def _codestream_start(frame: bytes) -> int:
    """Where a JPEG 2000 codestream begins: at 0, or in the jp2c box of a JP2 file (ISO 15444-1 I.4)."""
    place = 0
    if frame[4:8] != b"jP  ":
        return place
    while frame[place + 4 : place + 8] != b"jp2c":
        length = _number(frame, place, 4)
        if length < 8:  # 0 is "to the end", which only the last box may say; pydicom's own search would never end
            raise UnreadableImage("damaged compressed pixels")
        place += length
    return place + 8


def _jpeg_2000(frame: bytes, start: int) -> Coded:
    """ISO 15444-1 A.5.1: SIZ follows SOC at once."""
    if frame[start : start + 4] != b"\xff\x4f\xff\x51":
        raise UnreadableImage("damaged compressed pixels")
    right, bottom, left, top, width, height, tiles_left, tiles_top = (
        _number(frame, start + 8 + 4 * index, 4) for index in range(8)
    )
    samples = _number(frame, start + 40, 2)
    if not (width and height) or samples > 4:
        raise UnreadableImage("damaged compressed pixels")
    if -(-(right - tiles_left) // width) * -(-(bottom - tiles_top) // height) > MAX_TILES:
        raise UnreadableImage("damaged compressed pixels")
    depths = [frame[start + 42 + 3 * index] & 0x7F for index in range(samples)]
    return Coded(rows=bottom - top, columns=right - left, samples=samples, bits=max(depths, default=0) + 1)


def _check_rle(frame: bytes, claims: Declared) -> None:
    """PS3.5 G.5: the number of segments, one for each byte of each sample, and where each begins."""
    segments = int.from_bytes(frame[:4], "little")
    starts = [int.from_bytes(frame[4 + 4 * index : 8 + 4 * index], "little") for index in range(min(segments, 15))]
    if segments != claims.samples * -(-claims.allocated // 8) or len(frame) < 64:
        raise UnreadableImage("compressed pixels of another size than the header's")
    if starts[0] != 64 or any(
        later < earlier for earlier, later in zip(starts, [*starts[1:], len(frame)], strict=True)
    ):
        raise UnreadableImage("damaged compressed pixels")


def _number(frame: bytes, place: int, size: int) -> int:
    """Big-endian. Raises IndexError beyond the end, where a slice would be silently short."""
    frame[place + size - 1]
    return int.from_bytes(frame[place : place + size])
