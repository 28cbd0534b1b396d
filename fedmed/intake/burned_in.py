"""Burnt-in text in pixels: rows of small, sharp, evenly bright marks of one height, as letters are and anatomy is not.

A radiograph holds side markers of a letter or two, so a line of text starts at `LETTERS`. What is looked for: thin
strokes that stand out against their surroundings (a white top-hat, for either polarity), joined to components, of
which those with the size of letters are chained to lines by their height, their baseline and the gap between them.
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

LETTERS = 4  # in a line: side markers have one or two
SMALLEST, TALLEST = 6, 64  # px, height of a letter
STROKE = 0.12  # of a letter's widest stroke, as a share of the tallest
CONTRAST = 0.30  # of the picture's range, by which a stroke stands out
FRAMES = 3  # of a multi-frame object: first, middle, last

Grey = NDArray[np.float32]


def shows_text(dataset: Dataset) -> bool:
    """Whether there is a line of text in the first, middle or last frame.

    Args:
        dataset: with its pixels.

    Raises:
        UnreadableImage: they cannot be decoded.
    """
    frames = declared(dataset).frames
    wanted = {0, frames // 2, frames - 1} if frames >= FRAMES else set(range(frames))
    with plain_errors():
        for index, frame in enumerate(stored_frames(dataset)):
            if index in wanted and lines_of_text(_grey(frame)):
                return True
            if index >= max(wanted):
                break
    return False


def lines_of_text(picture: Grey) -> int:
    """How many lines of text a picture shows.

    Args:
        picture: (H, W), of any range.
    """
    low, high = float(picture.min()), float(picture.max())
    if not high > low:
        return 0
    unit = (picture - np.float32(low)) / np.float32(high - low)
    return _lines(unit) + _lines(1 - unit)


def _grey(frame: NDArray[Any]) -> Grey:
    values = np.asarray(frame, np.float32)
    return values.mean(axis=2, dtype=np.float32) if values.ndim == 3 else values


def _lines(picture: Grey) -> int:
    """Lines of bright text."""
    size = 9
    strokes = picture - ndimage.grey_opening(picture, size=(size, size))
    labels, _ = ndimage.label(strokes > CONTRAST, np.ones((3, 3), np.int8))
    letters = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        height, width = (side.stop - side.start for side in box)
        if not SMALLEST <= height <= TALLEST or width > 2 * height:
            continue
        filled = float(np.mean(labels[box] == number))
        if 0.15 <= filled <= 0.95:
            letters.append((box[0].start, box[0].stop, box[1].start, box[1].stop))
    return _chained(np.array(letters, np.int64).reshape(-1, 4))


def _chained(letters: NDArray[np.int64]) -> int:
    """Chains of at least `LETTERS` marks of one height on one baseline, each near the one before."""
    letters = letters[np.argsort(letters[:, 2], kind="stable")]
    lengths: list[int] = []
    ends: list[NDArray[np.int64]] = []
    for letter in letters:
        height = letter[1] - letter[0]
        for index, last in enumerate(ends):
            other = last[1] - last[0]
            near = -1 <= letter[2] - last[3] <= 1.5 * max(height, other)
            level = abs(letter[1] - last[1]) <= 0.2 * max(height, other) and max(height, other) <= 1.6 * min(
                height, other
            )
            if near and level:
                lengths[index] += 1
                ends[index] = letter
                break
        else:
            lengths.append(1)
            ends.append(letter)
    return sum(length >= LETTERS for length in lengths)
