"""From stored values to what a radiologist sees, in the standard's order (DICOM PS3.4 N.2).

    stored values -> modality LUT or rescale -> padding set apart -> VOI LUT or window -> polarity -> [0, 1]
       C.7.6.3           C.11.1                 C.7.5.1.1.2             C.11.2         C.7.6.3.1.2

Every step is a function of a data set and an array. Clauses are of DICOM PS3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.pixels import stored_values

Plane = NDArray[np.float32]
Window = Callable[[Plane, float, float], Plane]


def displayed(ds: Dataset) -> Plane:
    """The picture as it is to be shown: bone bright, background dark.

    Args:
        ds: a grey single-frame image with its pixels.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        UnreadableImage: the header or the pixels cannot be used.
    """
    stored = stored_values(ds)
    values = modality_values(ds, stored)
    padding = padding_mask(ds, stored)
    shown = contrast(ds, values, valid=~padding)
    if lowest_is_white(ds):
        shown = invert(shown)
    return np.where(padding, np.float32(0), shown)


def modality_values(ds: Dataset, stored: NDArray[Any]) -> Plane:
    """Stored values in the units of the modality: Modality LUT, or rescale slope and intercept (C.11.1)."""
    if ds.get("ModalityLUTSequence"):
        return look_up(ds.ModalityLUTSequence[0], stored).astype(np.float32)
    slope, intercept = _first(ds, "RescaleSlope", 1.0), _first(ds, "RescaleIntercept", 0.0)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise UnreadableImage("rescale slope is zero or not a number")
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def padding_mask(ds: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels outside the image: Pixel Padding Value (0028,0120), up to its Range Limit (0028,0121) (C.7.5.1.1.2).

    Both are stored values. A picture that is padding throughout says nothing, so its padding is taken as pixels.
    """
    if ds.get("PixelPaddingValue") is None:
        return np.zeros(stored.shape, bool)
    value = _as_stored(ds, int(ds.PixelPaddingValue))
    limit = _as_stored(ds, int(ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)))
    mask = (stored >= min(value, limit)) & (stored <= max(value, limit))
    return np.zeros(stored.shape, bool) if mask.all() else mask


def contrast(ds: Dataset, values: Plane, *, valid: NDArray[np.bool_]) -> Plane:
    """Values of interest as [0, 1]: the first VOI LUT, else the first window, else the range of valid pixels (C.11.2).

    A VOI LUT and a window in one object are alternatives; the LUT is preferred because it was made for the picture.
    """
    if ds.get("VOILUTSequence"):
        item = ds.VOILUTSequence[0]
        return look_up(item, values).astype(np.float32) / np.float32(2 ** int(item.LUTDescriptor[2]) - 1)
    if ds.get("WindowCenter") is not None and ds.get("WindowWidth") is not None:
        name = str(ds.get("VOILUTFunction") or "LINEAR").upper()
        if name not in WINDOWS:
            raise UnreadableImage("unknown VOI LUT function")
        centre, width = _first(ds, "WindowCenter", 0.0), _first(ds, "WindowWidth", 0.0)
        if not np.isfinite([centre, width]).all() or width < (1 if name == "LINEAR" else 0) or width == 0:
            raise UnreadableImage("impossible window width")
        return WINDOWS[name](values, centre, width)
    return full_range(values, valid=valid)


def full_range(values: Plane, *, valid: NDArray[np.bool_]) -> Plane:
    """Lowest valid value to 0, highest to 1; a flat picture to 0."""
    low, high = values[valid].min(), values[valid].max()
    return np.asarray(np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1), np.float32)


def linear(values: Plane, centre: float, width: float) -> Plane:
    """Window by C.11.2.1.2.1: the edges lie at c - 0.5 ± (w - 1)/2; a width of 1 is a threshold."""
    if width == 1:
        return (values > centre - 0.5).astype(np.float32)
    return np.asarray(np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1), np.float32)


def linear_exact(values: Plane, centre: float, width: float) -> Plane:
    """Window by C.11.2.1.3.2: the edges lie at c ± w/2."""
    return np.asarray(np.clip((values - centre) / width + 0.5, 0, 1), np.float32)


def sigmoid(values: Plane, centre: float, width: float) -> Plane:
    """Window by C.11.2.1.3.1: 1 / (1 + exp(-4 (x - c) / w))."""
    return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -80, 80))), np.float32)


WINDOWS: dict[str, Window] = {"LINEAR": linear, "LINEAR_EXACT": linear_exact, "SIGMOID": sigmoid}


def lowest_is_white(ds: Dataset) -> bool:
    """Whether the picture is to be inverted, once.

    MONOCHROME1 (C.7.6.3.1.2) and Presentation LUT Shape INVERSE (C.11.6, for DX C.8.11.3.1.2) say the same thing, and
    a DX image that says one must say the other.
    """
    return bool(ds.PhotometricInterpretation == "MONOCHROME1" or ds.get("PresentationLUTShape") == "INVERSE")


def invert(values: Plane) -> Plane:
    """White for black, within [0, 1]."""
    return 1 - values


def look_up(item: Dataset, values: NDArray[Any]) -> NDArray[np.uint16]:
    """Values through one item of a LUT sequence; beyond the ends of the table its first and last entry (C.11.1.1).

    Not pydicom's, which (3.0) wraps indices above 255 when entries have 8 bits and refuses 12-bit modality tables.

    Raises:
        UnreadableImage: the table is shorter than it says.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        packed = bits <= 8 and len(data) <= entries + 1  # two 8-bit entries in each word
        data = np.frombuffer(data[: len(data) // 2 * 2], np.uint8 if packed else np.dtype("<u2"))
    table = np.atleast_1d(np.asarray(data, dtype=np.int64)).astype(np.uint16)
    if not 1 <= bits <= 16 or len(table) < entries:
        raise UnreadableImage("lookup table is shorter than it says")
    return np.asarray(table[np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)])


def _as_stored(ds: Dataset, value: int) -> int:
    """A padding value read with the other sign than the pixels (its VR depends on Pixel Representation)."""
    cells = 1 << int(ds.BitsAllocated)
    if ds.PixelRepresentation == 1:
        return value - cells if value >= cells // 2 else value
    return value % cells


def _first(ds: Dataset, keyword: str, default: float) -> float:
    """The first of a value that may have several, as a window may."""
    value = ds.get(keyword)
    if isinstance(value, MultiValue | list | tuple):
        value = value[0] if value else None
    return default if value is None or value == "" else float(value)
