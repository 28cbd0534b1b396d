"""Compressed and plain pixels as arrays, through pydicom, by the fastest decoder that reads them right.

`benchmarks/data_decode.py` measures them; the order in `DECODERS` is its result. All are permissively licensed but
one: 12-bit JPEG Extended needs libjpeg of the `gpl-decoders` extra, GPL-3 and therefore not installed by default.

Three that pydicom offers are left out. Two may give wrong pixels without a word: libjpeg fills what is missing of a
truncated JPEG or JPEG-LS (so it is used for 12-bit JPEG only, and only on frames that have their end), and Pillow
shifts signed JPEG 2000 by half its range. GDCM aborts the process on some damaged JPEG that Pillow refuses.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.codestream import check_codestream, coded_size
from fedmed.imaging.dicom.pixels import Declared, declared, significant_bits

DECODERS: dict[UID, tuple[str, ...]] = {  # pydicom's names, the fastest first
    JPEGBaseline8Bit: ("pillow",),
    JPEGExtended12Bit: ("pillow", "pylibjpeg"),
    JPEGLossless: ("gdcm",),
    JPEGLosslessSV1: ("gdcm",),
    JPEGLSLossless: ("pyjpegls", "gdcm"),
    JPEGLSNearLossless: ("pyjpegls", "gdcm"),
    JPEG2000Lossless: ("pylibjpeg", "gdcm"),
    JPEG2000: ("pylibjpeg", "gdcm"),
    HTJ2KLossless: ("pylibjpeg",),
    HTJ2KLosslessRPCL: ("pylibjpeg",),
    HTJ2K: ("pylibjpeg",),
    RLELossless: ("pylibjpeg", "pydicom"),
}
GPL = {(JPEGExtended12Bit, "pylibjpeg")}  # elsewhere "pylibjpeg" is OpenJPEG or an RLE decoder
CONVERTED = ("YBR_FULL", "YBR_FULL_422")  # JPEG 2000 decoders undo YBR_ICT and YBR_RCT themselves
BLOCK = 2**18  # pixels
NEEDS_GPL = "12-bit JPEG needs a package under GPL-3: pip install 'pylibjpeg-libjpeg>=2.4'"


def stored_frames(ds: Dataset, *, gpl: bool = True, wanted: Sequence[int] = ()) -> Iterator[NDArray[Any]]:
    """The frames as the scanner stored them: sign extended, foreign bits removed (PS3.3 C.7.6.3.1.4).

    YBR_FULL and YBR_FULL_422 come out as RGB. Where High Bit is Bits Stored - 1, as it should be, the frames are
    those of pydicom's `pixel_array`.

    Args:
        ds: an object with its pixels.
        gpl: whether a decoder of the gpl-decoders extra may be used if it is installed.
        wanted: numbers of frames, from 0 and ascending: no other is decoded; () = all.

    Yields:
        (H, W) or (H, W, samples), maybe a read-only view of the object's own bytes.

    Raises:
        UnreadableImage: the header is wrong, no decoder reads the pixels, or there are too few frames.
    """
    claims = declared(ds)
    if not claims.syntax.is_encapsulated:
        yield from _frames_by(ds, claims, "", wanted)
        return
    if claims.syntax not in DECODERS:
        raise UnreadableImage("no decoder for its transfer syntax")
    for number, frame in enumerate(_coded_frames(ds, claims)):
        if not wanted or number in wanted:
            check_codestream(frame, claims)
    yield from _decompressed(ds, claims, wanted, gpl=gpl)


def _decompressed(ds: Dataset, claims: Declared, wanted: Sequence[int], *, gpl: bool) -> Iterator[NDArray[Any]]:
    """Each decoder in turn; the next one goes on at the frame where the last one failed."""
    done, names = 0, decoders_of(claims.syntax, gpl=gpl)
    failure: Exception | None = None
    for name in names:
        try:
            for index, frame in enumerate(_frames_by(ds, claims, name, wanted)):
                if index == done:
                    done += 1
                    yield frame
        except Exception as error:
            failure = error
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # Rust's RLE decoder: the data run over the frame's end
                raise UnreadableImage("damaged compressed pixels") from None
            raise
        else:
            return
    if claims.syntax == JPEGExtended12Bit and "pylibjpeg" not in names and _has_12_bits(ds, claims):
        raise UnreadableImage(NEEDS_GPL)
    if failure is None:
        raise UnreadableImage("no decoder for its transfer syntax is installed")
    raise failure if isinstance(failure, UnreadableImage) else UnreadableImage("compressed pixels cannot be decoded")


def decoders_of(syntax: UID, *, gpl: bool = True) -> list[str]:
    """The installed decoders of a transfer syntax, in the order in which they are tried."""
    names = DECODERS.get(syntax, ())
    installed = get_decoder(syntax).available_plugins if names else ()
    return [name for name in names if name in installed and (gpl or (syntax, name) not in GPL)]


def _frames_by(ds: Dataset, claims: Declared, name: str, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Those frames that are wanted by one decoder, "" = pydicom's own for plain pixels."""
    decoder = get_decoder(claims.syntax)
    plain = not claims.syntax.is_encapsulated
    cells = plain or claims.syntax == RLELossless  # other codecs carry the value, not the cell
    shifted = cells and claims.keyword == "PixelData" and claims.high != claims.stored - 1
    whole = claims.stored == claims.allocated  # then plain pixels need no copy
    options: dict[str, Any] = {"view_only": True} if plain and whole else {}
    if shifted:
        options["correct_unused_bits"] = False  # pydicom's correction takes High Bit for granted
    rgb_already = _already_rgb(ds, claims, wanted) if name == "pillow" and claims.samples == 3 else repeat(False)
    count = 0
    for frame, about in decoder.iter_array(ds, indices=wanted, decoding_plugin=name, raw=True, **options):
        count += 1
        if shifted:
            frame = significant_bits(frame, stored=claims.stored, high=claims.high)
        converted = next(rgb_already, False) or about["photometric_interpretation"] not in CONVERTED
        yield frame if converted else _rgb(frame)
    if count < (len(wanted) or claims.frames):
        raise UnreadableImage("fewer frames than its header declares")


def _already_rgb(ds: Dataset, claims: Declared, wanted: Sequence[int]) -> Iterator[bool]:
    """Of each wanted JPEG frame whether Pillow makes RGB of it, while pydicom (3.0) goes on to call it YBR.

    It does where there is Adobe's APP14 segment (ISO 10918-6 6.5.3), unless that says that there is nothing to convert.
    """
    for number, frame in enumerate(_coded_frames(ds, claims)):
        if wanted and number not in wanted:
            continue
        with Image.open(io.BytesIO(frame), formats=("JPEG",)) as image:
            about = image.info
        yield about.get("adobe_transform") == 1 or ("adobe_transform" in about and "jfif" in about)


def _rgb(frame: NDArray[Any]) -> NDArray[Any]:
    """YBR_FULL as RGB (C.7.6.3.1.2), some rows at a time: pydicom's conversion needs sixteen times their bytes."""
    out = np.empty_like(frame)
    step = max(1, BLOCK // frame.shape[1])
    for top in range(0, len(frame), step):
        out[top : top + step] = convert_color_space(frame[top : top + step], "YBR_FULL", "RGB")
    return out


def _coded_frames(ds: Dataset, claims: Declared) -> Iterator[bytes]:
    """The compressed frames one by one (PS3.5 A.4)."""
    offsets = None
    if "ExtendedOffsetTable" in ds and "ExtendedOffsetTableLengths" in ds:
        offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths)
    count = 0
    try:
        for frame in generate_frames(ds.PixelData, number_of_frames=claims.frames, extended_offsets=offsets):
            count += 1
            yield frame
    except UnreadableImage:
        raise
    except Exception:
        raise UnreadableImage("damaged compressed pixels") from None
    if count < claims.frames:
        raise UnreadableImage("fewer frames than its header declares")


def _has_12_bits(ds: Dataset, claims: Declared) -> bool:
    return any(coded_size(frame).bits > 8 for frame in _coded_frames(ds, claims))
