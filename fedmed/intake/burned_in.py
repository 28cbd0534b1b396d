"""Burnt-in text in pixels: rows of small, sharp marks of one height, as letters are and anatomy is not.

What is looked for: strokes that stand out against what is around them (a top-hat, for bright and for dark text), joined
to marks, of which those with the size of letters are chained to lines by height, baseline and gap, from left to right
and from top to bottom. Large pictures are looked at in smaller sizes too, where large letters have thin strokes. A side
marker has one or two letters, so a line starts at `LETTERS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.pixels import declared
from fedmed.imaging.plain_errors import plain_errors

LETTERS = 4  # in a line
SHORTEST, TALLEST = 6, 40  # px, height of a letter in one of the sizes
STROKE = 9  # px, wider strokes stand out in a smaller size
CONTRAST = 64  # of 255, by which a stroke stands out
FILLED = (0.15, 0.92)  # of its box, by the strokes of a letter
SMALLEST_PICTURE = 128  # px, longer side: below it letters have no shape
PERCENTILES = (0.1, 99.9)  # between which a picture has its greys
SAMPLE = 2**20  # pixels from which they are taken

Grey = NDArray[np.uint8]
Boxes = NDArray[np.int64]  # (N, 4) top, bottom, left, right of marks


def shows_text(dataset: Dataset) -> bool:
    """Whether there is a line of text in the first, middle or last frame.

    Args:
        dataset: with its pixels.

    Raises:
        UnreadableImage: they cannot be decoded.
    """
    frames = declared(dataset).frames
    wanted = {0, frames // 2, frames - 1}
    with plain_errors():
        for index, frame in enumerate(stored_frames(dataset)):
            if index in wanted and lines_of_text(frame):
                return True
            if index == frames - 1:
                break
    return False


def lines_of_text(picture: NDArray[Any]) -> int:
    """How many lines of text a picture shows, in the size where most are found.

    Args:
        picture: (H, W) or (H, W, samples) of any kind of number.
    """
    values = picture.mean(axis=2) if picture.ndim == 3 else picture
    return max((_lines_of(grey) for stretched in _stretched(values) for grey in _sizes(stretched)), default=0)


def _stretched(values: NDArray[Any]) -> list[Grey]:
    """The picture in 256 greys; once more over its whole range where a few pixels, as text may be, lie far outside."""
    sample = values.reshape(-1)[:: max(1, values.size // SAMPLE)]
    low, high = (float(value) for value in np.percentile(sample, PERCENTILES))
    lowest, highest = float(values.min()), float(values.max())
    ranges = [(low, high)] if high > low else []
    if highest - lowest > 1.5 * (high - low):
        ranges.append((lowest, highest))
    return [
        (np.clip((values.astype(np.float32) - a) * np.float32(255 / (b - a)), 0, 255)).astype(np.uint8)
        for a, b in ranges
    ]


def _sizes(grey: Grey) -> list[Grey]:
    """The picture, its half and its quarter, as long as letters have a shape in it."""
    sizes = [grey] if max(grey.shape) >= SMALLEST_PICTURE else []
    for _ in range(2):
        if max(grey.shape) < 4 * SMALLEST_PICTURE:
            break
        height, width = (side // 2 * 2 for side in grey.shape)
        quarters = grey[:height, :width].reshape(height // 2, 2, width // 2, 2)
        grey = quarters.mean(axis=(1, 3), dtype=np.float32).astype(np.uint8)
        sizes.append(grey)
    return sizes


def _lines_of(grey: Grey) -> int:
    """Lines of bright text and of dark text."""
    found = [_marks(side) for side in (grey, 255 - grey)]
    return sum(_lines(marks) + _lines(marks[:, [2, 3, 0, 1]]) for marks in found)


def _marks(grey: Grey) -> Boxes:
    """What is bright, thin and sharp, and neither a speck nor a wire."""
    strokes = grey - _spread(_spread(grey, np.minimum), np.maximum)  # white top-hat: the opening is never above
    labels, _ = ndimage.label(strokes > CONTRAST, np.ones((3, 3), np.int8))
    boxes = [(rows.start, rows.stop, columns.start, columns.stop) for rows, columns in ndimage.find_objects(labels)]
    marks = np.array(boxes, np.int64).reshape(-1, 4)
    filled = np.bincount(labels.reshape(-1), minlength=len(marks) + 1)[1:]
    height, width = marks[:, 1] - marks[:, 0], marks[:, 3] - marks[:, 2]
    share = filled / np.maximum(height * width, 1)
    long, short = np.maximum(height, width), np.minimum(height, width)
    fits = (long >= SHORTEST) & (long <= TALLEST) & (share >= FILLED[0]) & ((share <= FILLED[1]) | (short < SHORTEST))
    return np.asarray(marks[fits], np.int64)


def _spread(grey: Grey, extreme: Any) -> Grey:
    """Running minimum or maximum over `STROKE` pixels in both directions, by doubling: 2, 4, 8, 9."""
    for axis in (0, 1):
        padded = np.pad(grey, [(STROKE // 2,) * 2 if axis == other else (0, 0) for other in (0, 1)], mode="edge")
        moved = np.moveaxis(padded, axis, 0)
        width = 1
        while width < STROKE:
            step = min(width, STROKE - width)
            moved = extreme(moved[:-step], moved[step:])
            width += step
        grey = np.moveaxis(moved, 0, axis)
    return grey


def _lines(marks: Boxes) -> int:
    """Chains of at least `LETTERS` marks of one height on one baseline, each near the one before."""
    height, width = marks[:, 1] - marks[:, 0], marks[:, 3] - marks[:, 2]
    marks = marks[(height >= SHORTEST) & (width <= 1.6 * height)]
    marks = marks[np.argsort(marks[:, 2], kind="stable")]
    lengths = np.ones(len(marks), np.int64)  # of the longest chain that ends at a mark
    height = marks[:, 1] - marks[:, 0]
    for index in range(1, len(marks)):
        top, bottom, left, _ = marks[index]
        first = np.searchsorted(marks[:, 2], left - 4 * TALLEST)
        before = slice(first, index)
        taller = np.maximum(height[before], height[index])
        gap = left - marks[before, 3]
        fits = (gap >= -1) & (gap <= 0.9 * taller) & (np.abs(bottom - marks[before, 1]) <= 0.15 * taller + 1)
        fits &= np.abs(top - marks[before, 0]) <= 0.25 * taller + 1
        if fits.any():
            lengths[index] += lengths[before][fits].max()
    return int((lengths == LETTERS).sum())
