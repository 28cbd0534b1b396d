"""PNG and JPEG files as arrays; masks among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.colour import LUMA
from fedmed.imaging.dicom.pixels import MAX_FRAME_BYTES

Pixels = NDArray[np.float32]
Stored = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.bool_]

SOFT_LEVELS = 8  # between black and full white; a mask with more has soft edges, one with fewer may hold scaled classes


def read_raster(path: Path, channels: int) -> Pixels:
    """A picture scaled by the full range of its pixel type.

    A picture of 12 bits in cells of 16 stays as dark as it was written: a scale guessed from each picture would differ
    between them. A data check warns of such pictures instead.

    Args:
        path: PNG or JPEG.
        channels: 1 = grey, colours by their luma; 3 = RGB, grey in three equal channels.

    Returns:
        (channels, H, W) float32 in [0, 1].

    Raises:
        UnreadableImage: it is larger than any picture.
        Exception: whatever Pillow raises; see `plain_errors`.
    """
    pixels = raster(path)
    highest = {"b": 1, "u": 2 ** (8 * pixels.dtype.itemsize) - 1}[pixels.dtype.kind]
    scaled = pixels.astype(np.float32)
    del pixels
    scaled /= np.float32(highest)
    if scaled.ndim == 3 and channels == 1:
        scaled = scaled @ np.array(LUMA, np.float32)
    return scaled.transpose(2, 0, 1) if scaled.ndim == 3 else np.broadcast_to(scaled, (channels, *scaled.shape))


def raster(path: Path, *, upright: bool = True) -> Stored:
    """A picture as stored.

    Args:
        path: PNG or JPEG.
        upright: turned, if its EXIF data say how it was held.

    Returns:
        (H, W) or (H, W, 3).

    Raises:
        UnreadableImage: it is larger than any picture.
        Exception: whatever Pillow raises; see `plain_errors`.
    """
    with _opened(path, upright=upright) as image:
        return _stored(image, indices=False)


def read_classes(path: Path, *, labels: int) -> NDArray[np.int64]:
    """A mask as class numbers.

    With one label, JPEG and soft edges are cut at half of the highest value: whatever is not 0 would else be label 1,
    noise of the compression too.

    Args:
        path: PNG, grey or with a palette, or grey in three equal channels; of one label also JPEG.
        labels: of the task; 0 = unknown, numbers are as stored.

    Returns:
        (H, W); of one label with soft edges 0 and 1.

    Raises:
        UnreadableImage: it has colours, is partly transparent, or is JPEG, which blurs the numbers of several labels.
        Exception: as `raster`.
    """
    with _opened(path) as image:
        palette, lossy = image.mode == "P", image.format != "PNG"
        opaque = np.asarray(image.getchannel("A")) == 255 if image.mode in ("LA", "RGBA") else np.True_
        numbers = _stored(image, indices=True)
    if numbers.ndim == 3:
        if (numbers != numbers[..., :1]).any():
            raise UnreadableImage("it has colours")
        numbers = numbers[..., 0]
    if (numbers.astype(np.bool_) & ~opaque).any():
        raise UnreadableImage("it is partly transparent")
    if lossy and labels > 1:
        raise UnreadableImage("JPEG blurs the numbers of several labels; write it as PNG")
    if labels == 1 and (lossy or (not palette and _is_soft(numbers))):
        numbers = numbers > numbers.max(initial=0) / 2
    classes: NDArray[np.int64] = numbers.astype(np.int64)
    return classes


def _is_soft(numbers: Stored) -> bool:
    """Whether a grey picture is mostly full white, and reaches it by more steps than masks of classes have."""
    if numbers.dtype.kind != "u":
        return False
    white = numbers == 2 ** (8 * numbers.dtype.itemsize) - 1
    mostly = 2 * np.count_nonzero(white) > np.count_nonzero(numbers)
    return bool(mostly) and len(np.unique(numbers)) > SOFT_LEVELS + 2


@contextmanager
def _opened(path: Path, *, upright: bool = True) -> Iterator[Image.Image]:
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        if image.width * image.height * 4 > MAX_FRAME_BYTES:
            raise UnreadableImage(f"larger than {MAX_FRAME_BYTES >> 20} MiB")
        image.load()
        if upright:
            with suppress(Exception):  # damaged EXIF data say nothing, and the picture is whole
                ImageOps.exif_transpose(image, in_place=True)
        yield image


def _stored(image: Image.Image, *, indices: bool) -> Stored:
    """The pixels; of a palette its numbers rather than its colours if `indices`."""
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16)  # 16-bit PNG
    if image.mode in ("1", "L") or (image.mode == "P" and indices):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))
