"""PNG and JPEG files as arrays; masks among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.colour import LUMA
from fedmed.imaging.dicom.pixels import MAX_FRAME_BYTES

Pixels = NDArray[np.float32]


def read_raster(path: Path, channels: int) -> Pixels:
    """A picture scaled by the full range of its pixel type.

    Args:
        path: PNG or JPEG.
        channels: 1 = grey, colours by their luma; 3 = RGB, grey in three equal channels.

    Returns:
        (channels, H, W) float32 in [0, 1].

    Raises:
        UnreadableImage: it is larger than any picture.
        Exception: whatever Pillow raises; see `plain_errors`.
    """
    pixels = raster(path, indices=False)
    highest = {"b": 1, "u": 2 ** (8 * pixels.dtype.itemsize) - 1}[pixels.dtype.kind]
    scaled = pixels.astype(np.float32)
    del pixels
    scaled /= np.float32(highest)
    if scaled.ndim == 3 and channels == 1:
        scaled = scaled @ np.array(LUMA, np.float32)
    return scaled.transpose(2, 0, 1) if scaled.ndim == 3 else np.broadcast_to(scaled, (channels, *scaled.shape))


def raster(path: Path, *, indices: bool) -> NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.bool_]:
    """A picture as stored.

    Args:
        path: PNG or JPEG.
        indices: a palette's numbers rather than its colours.

    Returns:
        (H, W) or (H, W, 3).

    Raises:
        UnreadableImage: it is larger than any picture.
        Exception: whatever Pillow raises; see `plain_errors`.
    """
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        if image.width * image.height * 4 > MAX_FRAME_BYTES:
            raise UnreadableImage(f"larger than {MAX_FRAME_BYTES >> 20} MiB")
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)  # 16-bit PNG
        if image.mode in ("1", "L") or (image.mode == "P" and indices):
            return np.asarray(image)
        return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))
