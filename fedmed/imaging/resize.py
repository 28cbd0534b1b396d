"""Pictures and masks to a square of fixed size, keeping their aspect ratio (a stretched heart looks enlarged).

Pillow does it, and not torch, because the processes that decode must start fast and stay small.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixel = TypeVar("Pixel", bound=np.generic)


NEARLY_SQUARE = 0.01  # up to this relative difference of their sides pixels are taken as square


def aspect_of(row_mm: float, column_mm: float) -> float:
    """How many times as high as wide a pixel is, by the distances of rows and columns; 1 where they are impossible."""
    if not (0 < row_mm < math.inf and 0 < column_mm < math.inf):
        return 1.0
    aspect = row_mm / column_mm
    return 1.0 if abs(aspect - 1) <= NEARLY_SQUARE else aspect


def letterbox(image: NDArray[np.float32], size: int, aspect: float = 1.0) -> NDArray[np.float32]:
    """Scale the long side to `size` (bilinear, antialiased when it shrinks), centre, pad with 0.

    Args:
        image: (C, H, W).
        size: pixels of a side.
        aspect: of a pixel, see `aspect_of`; those of the square are square.

    Returns:
        (C, size, size).
    """
    height, width = fitted(image.shape[1:], size, aspect)
    scaled = np.empty((image.shape[0], height, width), np.float32)
    for channel, plane in zip(scaled, image, strict=True):
        whole = Image.fromarray(np.ascontiguousarray(plane, np.float32))  # mode "F"
        channel[...] = np.asarray(whole.resize((width, height), Image.Resampling.BILINEAR))
    return _centred(scaled, size)


def letterbox_mask(mask: NDArray[np.uint8], size: int, aspect: float = 1.0) -> NDArray[np.uint8]:
    """The same geometry for masks, each pixel from the nearest centre.

    Args:
        mask: (L, H, W).
        size: pixels of a side.
        aspect: of a pixel.

    Returns:
        (L, size, size).
    """
    height, width = fitted(mask.shape[1:], size, aspect)
    rows = _nearest(mask.shape[1], height)
    columns = _nearest(mask.shape[2], width)
    return _centred(mask[:, rows[:, None], columns[None, :]], size)


def fitted(shape: tuple[int, ...], size: int, aspect: float = 1.0) -> tuple[int, int]:
    """Height and width with the long side at `size` and the short one at least 1, of pixels of an aspect."""
    height, width = shape[0] * aspect, shape[1]
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """For each new pixel the old one whose centre is nearest."""
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)


def _centred(pixels: NDArray[Pixel], size: int) -> NDArray[Pixel]:
    square = np.zeros((pixels.shape[0], size, size), pixels.dtype)
    top, left = (size - pixels.shape[1]) // 2, (size - pixels.shape[2]) // 2
    square[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return square
