"""From stored values to what a radiologist sees, in the standard's order (DICOM PS3.4 N.2).

    stored values -> modality LUT or rescale -> padding set apart -> VOI LUT or window -> polarity -> [0, 1]
       C.7.6.3           C.11.1                 C.7.5.1.1.2             C.11.2         C.7.6.3.1.2

Every step is a function of a data set and an array. Clauses are of DICOM PS3.3. The functions that end in an
underscore work in the array that they are given, which is theirs: a mammogram has 100 MB as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.frames import frame_values, values_of_interest
from fedmed.imaging.dicom.modality import Plane, first, look_up

Window = Callable[[Plane, float, float], Plane]


def displayed_frames(ds: Dataset) -> Iterator[Plane]:
    """Every frame as it is to be shown, with its own window where frames have their own (C.7.6.16.2.10).

    Yields:
        (H, W) float32 in [0, 1].

    Raises:
        UnreadableImage: the header or the pixels cannot be used.
    """
    for index, frame in enumerate(frame_values(ds)):
        padded = bool(frame.padding.any())
        shown = contrast_(values_of_interest(ds, index), frame.values, valid=~frame.padding if padded else None)
        if frame.lowest_is_white:
            shown = invert(shown)
        if padded:
            shown[frame.padding] = 0
        yield shown


def contrast_(source: Dataset, values: Plane, *, valid: NDArray[np.bool_] | None) -> Plane:
    """Values of interest as [0, 1]: the first VOI LUT, else the first window, else the range of valid pixels (C.11.2).

    A VOI LUT and a window in one object are alternatives; the LUT is preferred because it was made for the picture.
    Of several windows the first is the default. One whose width nothing can be shown by is passed over: 0, below it, or
    not a number. A linear width below 1, which the clause forbids, is taken as the exact one's, which may have it.
    """
    if source.get("VOILUTSequence"):
        item = source.VOILUTSequence[0]
        values[...] = look_up(item, values)
        values /= np.float32(2 ** int(item.LUTDescriptor[2]) - 1)
        return np.clip(values, 0, 1, out=values)
    if source.get("WindowCenter") is not None and source.get("WindowWidth") is not None:
        name = str(source.get("VOILUTFunction") or "LINEAR").upper()
        if name not in WINDOWS:
            raise UnreadableImage("unknown VOI LUT function")
        centre, width = first(source, "WindowCenter", 0.0), first(source, "WindowWidth", 0.0)
        if np.isfinite([centre, width]).all() and width > 0:
            return WINDOWS["LINEAR_EXACT" if width < 1 and name == "LINEAR" else name](values, centre, width)
    return full_range_(values, valid=valid)


def full_range_(values: Plane, *, valid: NDArray[np.bool_] | None) -> Plane:
    """Lowest valid value to 0, highest to 1; a flat picture to 0."""
    low = values.min() if valid is None else values.min(where=valid, initial=np.inf)
    high = values.max() if valid is None else values.max(where=valid, initial=-np.inf)
    values -= low
    values /= high - low if high > low else 1
    return np.clip(values, 0, 1, out=values)


def linear_(values: Plane, centre: float, width: float) -> Plane:
    """Window by C.11.2.1.2.1: the edges lie at c - 0.5 ± (w - 1)/2; a width of 1 is a threshold."""
    if width == 1:
        return np.greater(values, centre - 0.5, out=values, casting="unsafe")
    return linear_exact_(values, centre - 0.5, width - 1)


def linear_exact_(values: Plane, centre: float, width: float) -> Plane:
    """Window by C.11.2.1.3.2: the edges lie at c ± w/2."""
    values -= np.float32(centre)
    values /= np.float32(width)
    values += np.float32(0.5)
    return np.clip(values, 0, 1, out=values)


def sigmoid_(values: Plane, centre: float, width: float) -> Plane:
    """Window by C.11.2.1.3.1: 1 / (1 + exp(-4 (x - c) / w))."""
    values -= np.float32(centre)
    values *= np.float32(-4 / width)
    np.clip(values, -80, 80, out=values)
    np.exp(values, out=values)
    values += 1
    return np.reciprocal(values, out=values)


WINDOWS: dict[str, Window] = {"LINEAR": linear_, "LINEAR_EXACT": linear_exact_, "SIGMOID": sigmoid_}


def invert(values: Plane) -> Plane:
    """White for black, within [0, 1]."""
    return np.subtract(np.float32(1), values, out=values)
