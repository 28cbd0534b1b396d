"""Burnt-in text in pixels: rows of small, sharp marks of one height, as letters are and anatomy is not.

What is looked for: strokes that stand out against what is around them (a top-hat, for bright and for dark text), joined
to marks, of which those with the size of letters are chained to lines by height, baseline and gap, from left to right
and from top to bottom. Large pictures are looked at in smaller sizes too, where large letters have thin strokes. A side
marker has one or two letters, so a line starts at `LETTERS`. Where tesseract is installed, it is shown what may be a
line, shorter ones too: what it reads is text, and what it cannot read still is if its shape says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.pixels import declared
from fedmed.imaging.plain_errors import plain_errors
from fedmed.intake import tesseract

READ, SHAPED = "burned-in text, read by tesseract", "burned-in text, by its shape"
LETTERS = 4  # in a line
WORTH_READING, SHOWN = 2, 12  # letters of a line that tesseract is shown; lines of a picture, those with most letters
SHORTEST, TALLEST = 6, 40  # px, height of a letter in one of the sizes
STROKE = 9  # px, wider strokes stand out in a smaller size
CONTRAST = 64  # of 255, by which a stroke stands out
STRIPE = (0.2, 0.38)  # width of its height: an I is narrower, a 1 and all other letters are wider
AROUND = 8  # heights, beside a line: letters that touch each other are no marks, and may belong to it
FILLED = (0.15, 0.92)  # of its box, by the strokes of a letter
SMALLEST_PICTURE = 128  # px, longer side: below it letters have no shape
PERCENTILES = (0.1, 99.9)  # between which a picture has its greys
SAMPLE = 2**20  # pixels from which they are taken

Grey = NDArray[np.uint8]
Boxes = NDArray[np.int64]  # (N, 4) top, bottom, left, right of marks


@dataclass(frozen=True, kw_only=True)
class Line:
    """Marks that may be a line of text."""

    letters: float  # marks, of which some count half
    height: int  # px
    picture: Grey  # its strokes and those around it, dark on white


def shows_text(dataset: Dataset) -> str | None:
    """`READ` or `SHAPED` if there is a line of text in the first, middle or last frame, None if there is none.

    Args:
        dataset: with its pixels.

    Raises:
        UnreadableImage: they cannot be decoded.
    """
    with plain_errors():
        return next(filter(None, map(text_in, judged_frames(dataset))), None)


def judged_frames(dataset: Dataset) -> Iterator[NDArray[Any]]:
    """The first, the middle and the last frame, (H, W) or (H, W, samples) stored values.

    Raises:
        UnreadableImage: they cannot be decoded.
    """
    frames = declared(dataset).frames
    yield from stored_frames(dataset, wanted=sorted({0, frames // 2, frames - 1}))


def stretched(picture: NDArray[Any]) -> list[Grey]:
    """A picture in 256 greys, as text is looked for in it; none of one value.

    Where a few pixels, as text may be, lie far outside the others' range, it comes once more over its whole range.
    """
    values = picture.mean(axis=2) if picture.ndim == 3 else picture
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


def text_in(picture: NDArray[Any]) -> str | None:
    """`READ` or `SHAPED` if a picture shows a line of text, None if it shows none.

    Args:
        picture: (H, W) or (H, W, samples) of any kind of number.
    """
    lines = sorted(_lines(picture), key=lambda line: line.letters, reverse=True)
    shown = [(line.picture, line.height) for line in lines[:SHOWN]]
    if shown and tesseract.installed() and tesseract.reads_a_word(shown):
        return READ
    return SHAPED if lines and lines[0].letters >= LETTERS else None


def lines_of_text(picture: NDArray[Any]) -> int:
    """How many lines of text a picture shows by their shape alone, in all sizes.

    Args:
        picture: as `text_in` takes it.
    """
    return sum(line.letters >= LETTERS for line in _lines(picture))


def _lines(picture: NDArray[Any]) -> Iterator[Line]:
    """Bright and dark lines in every size, upright and turned by a right angle either way."""
    for grey in (grey for whole in stretched(picture) for grey in _sizes(whole)):
        for side in (grey, 255 - grey):
            strokes = side - _spread(_spread(side, np.minimum), np.maximum)  # white top-hat: the opening is never above
            marks, shown = _marks(strokes), 255 - np.minimum(strokes, 127) * 2
            yield from _chained(shown, marks)
            for line in _chained(shown.T, marks[:, [2, 3, 0, 1]]):
                yield replace(line, picture=line.picture[::-1])  # reads upwards, as most text at an edge does
                yield replace(line, picture=line.picture[:, ::-1])


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


def _marks(strokes: Grey) -> Boxes:
    """What is bright, thin and sharp, and neither a speck nor a wire."""
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


def _chained(grey: Grey, marks: Boxes) -> Iterator[Line]:
    """Chains of marks of one height on one baseline, each near the one before.

    The baseline is that of the whole chain, from which findings in a row drift away; and a mark that is broader than an
    I and narrower than other letters, as stripes are, counts half.
    """
    height, width = marks[:, 1] - marks[:, 0], marks[:, 3] - marks[:, 2]
    marks = marks[(height >= SHORTEST) & (width <= 1.6 * height)]
    marks = marks[np.argsort(marks[:, 2], kind="stable")]
    height, width = marks[:, 1] - marks[:, 0], marks[:, 3] - marks[:, 2]
    stripes = (height >= 2 * SHORTEST) & (width >= STRIPE[0] * height) & (width < STRIPE[1] * height)
    worth = np.where(stripes, 0.5, 1.0)
    lengths, boxes, ends = worth.copy(), marks.copy(), np.ones(len(marks), np.bool_)  # of the longest chain to a mark
    began = marks[:, 1].copy()  # bottom of its first mark
    for index in range(1, len(marks)):
        top, bottom, left, right = marks[index]
        first = np.searchsorted(marks[:, 2], left - 4 * TALLEST)
        before = slice(first, index)
        taller = np.maximum(height[before], height[index])
        gap = left - marks[before, 3]
        fits = (gap >= -1) & (gap <= 0.7 * taller + 1.2)
        fits &= np.abs(bottom - marks[before, 1]) <= np.minimum(0.15 * taller + 1, 0.06 * taller + 1.65)
        fits &= np.abs(top - marks[before, 0]) <= 0.25 * taller + 1
        fits &= np.abs(bottom - began[before]) <= 0.15 * taller + 2
        if fits.any():
            last = first + int(np.where(fits, lengths[before], 0).argmax())
            lengths[index], began[index], ends[last] = lengths[last] + worth[index], began[last], False
            up, down, start, _ = boxes[last]
            boxes[index] = min(up, top), max(down, bottom), start, right
    for end in np.flatnonzero(ends & (lengths >= WORTH_READING)):
        top, bottom, left, right = (int(side) for side in boxes[end])
        tall = bottom - top
        rows = slice(max(0, top - tall // 2), bottom + tall // 2)
        columns = slice(max(0, left - AROUND * tall), right + AROUND * tall)
        yield Line(letters=float(lengths[end]), height=tall, picture=grey[rows, columns])
