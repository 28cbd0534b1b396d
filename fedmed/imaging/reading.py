"""One image file as an array in [0, 1], whatever it is: DICOM by its content, else PNG or JPEG.

What a picture has to become depends on the work: a `Preset` says so. The table holds one line per preset.
"""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from fedmed.errors import ConfigError, UnreadableImage
from fedmed.imaging.dicom.colour import displayed_colour
from fedmed.imaging.dicom.grey import displayed
from fedmed.imaging.dicom.pixels import MAX_PIXEL_BYTES

Pixels = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a picture becomes."""

    channels: int


PRESETS = {
    "cxr": Preset(channels=1),  # projection radiographs: VOI, polarity, grey
    "color": Preset(channels=3),  # fundus, skin, endoscopy; a grey picture becomes three equal channels
}


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f'data.preset = "{name}" is unknown; there are {", ".join(PRESETS)}')
    return PRESETS[name]


def read_image(path: Path, *, preset: str = "cxr") -> Pixels:
    """Read one picture.

    Args:
        path: DICOM (known by its content), PNG or JPEG.
        preset: a key of `PRESETS`.

    Returns:
        (C, H, W) in [0, 1]; C = 1 for "cxr", 3 for "color".

    Raises:
        UnreadableImage: for whatever reason it cannot be read. The message names neither file nor patient.
        ConfigError: the preset is unknown.
    """
    channels = preset_named(preset).channels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's and Pillow's may quote the header
            pixels = _read_dicom(path, channels) if is_dicom(path) else _read_raster(path, channels)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise anything at all; the text may quote the header, so it is dropped
        raise UnreadableImage(_reason(error)) from None
    if not np.isfinite(pixels).all():
        raise UnreadableImage("pixels that are not numbers")
    return pixels


def read_mask(path: Path) -> NDArray[np.int64]:
    """Read a mask, (H, W) of class numbers, from a PNG of one channel.

    Raises:
        UnreadableImage: it cannot be read, or has colours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mask = _raster(path)
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"mask: {_reason(error)}") from None
    if mask.ndim != 2:
        raise UnreadableImage("mask has colours")
    return mask.astype(np.int64)


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's preamble (PS3.10 7.1). Raises OSError."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_dicom(path: Path, channels: int) -> Pixels:
    ds = pydicom.dcmread(path)
    if "TransferSyntaxUID" not in ds.file_meta:
        raise UnreadableImage("header lacks TransferSyntaxUID")
    if channels == 1:
        return displayed(ds)[None]
    if ds.get("SamplesPerPixel") == 1 and str(ds.get("PhotometricInterpretation")).startswith("MONOCHROME"):
        return np.repeat(displayed(ds)[None], channels, axis=0)
    return displayed_colour(ds)


def _read_raster(path: Path, channels: int) -> Pixels:
    pixels = _raster(path, indices=False)
    highest = {"b": 1, "u": 2 ** (8 * pixels.dtype.itemsize) - 1}[pixels.dtype.kind]
    scaled: Pixels = np.asarray(pixels / highest, np.float32)
    if scaled.ndim == 3 and channels == 1:
        scaled = scaled @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma, as Pillow's "L"
    return scaled.transpose(2, 0, 1) if scaled.ndim == 3 else np.repeat(scaled[None], channels, axis=0)


def _raster(path: Path, *, indices: bool = True) -> NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.bool_]:
    """(H, W) or (H, W, 3) as stored. `indices`: a palette's numbers rather than its colours."""
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        if image.width * image.height * 4 > MAX_PIXEL_BYTES:
            raise UnreadableImage(f"larger than {MAX_PIXEL_BYTES >> 20} MiB")
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)  # 16-bit PNG
        if image.mode in ("1", "L") or (image.mode == "P" and indices):
            return np.asarray(image)
        return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))


def _reason(error: Exception) -> str:
    """A reason without any text from the file."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "a folder, not a file"
        case PermissionError():
            return "no permission to read it"
        case InvalidDicomError() | UnidentifiedImageError():
            return "neither DICOM, PNG nor JPEG"
        case EOFError() | zlib.error():
            return "truncated file"
        case OSError() if "truncated" in str(error).lower():
            return "truncated file"
        case Image.DecompressionBombError():
            return f"larger than {MAX_PIXEL_BYTES >> 20} MiB"
        case _:
            return f"cannot be decoded ({type(error).__name__})"
