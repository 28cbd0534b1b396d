"""Stored values in the units of the modality: Modality LUT or rescale, and which of them are padding (DICOM PS3.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from fedmed.errors import UnreadableImage

Plane = NDArray[np.float32]
BLOCK = 2**18  # pixels looked up at a time: numpy needs indices of 8 bytes


def modality_values(source: Dataset, stored: NDArray[Any]) -> Plane:
    """Stored values in the units of the modality: Modality LUT, or rescale slope and intercept (C.11.1).

    Args:
        source: where LUT or slope stand: the object, or one frame's Pixel Value Transformation (C.7.6.16.2.9).
        stored: (H, W) integers.

    Returns:
        A new (H, W) float32: HU for CT, counts or Bq/ml for PET, arbitrary for radiographs and most MR.

    Raises:
        UnreadableImage: the LUT is short, or the slope is zero or not a number.
    """
    if source.get("ModalityLUTSequence"):
        return look_up(source.ModalityLUTSequence[0], stored).astype(np.float32)
    slope, intercept = first(source, "RescaleSlope", 1.0), first(source, "RescaleIntercept", 0.0)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise UnreadableImage("rescale slope is zero or not a number")
    values: Plane = stored.astype(np.float32)
    if slope != 1:
        values *= np.float32(slope)
    if intercept != 0:
        values += np.float32(intercept)
    return values


def padding_mask(ds: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels outside the image: Pixel Padding Value (0028,0120), up to its Range Limit (0028,0121) (C.7.5.1.1.2).

    Both are stored values. A picture that is padding throughout says nothing, so its padding is taken as
    pixels. Where there is none, the mask is read-only.
    """
    if ds.get("PixelPaddingValue") is None:
        return _none(stored)
    value = _as_stored(ds, int(ds.PixelPaddingValue))
    limit = _as_stored(ds, int(ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)))
    if value == limit:
        mask = np.equal(stored, value)
    else:
        mask = stored >= min(value, limit)
        mask &= stored <= max(value, limit)
    return _none(stored) if mask.all() else mask


def look_up(item: Dataset, values: NDArray[Any]) -> NDArray[np.uint16]:
    """Values through one item of a LUT sequence; beyond the ends of the table its first and last entry (C.11.1.1).

    Not pydicom's, which (3.0) wraps indices above 255 when entries have 8 bits and refuses 12-bit modality tables.

    Args:
        item: LUT Descriptor (0028,3002) and LUT Data (0028,3006).
        values: of any shape.

    Raises:
        UnreadableImage: the table is shorter than it says.
    """
    entries, lowest, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 2**16
    table = _table(item, entries, bits)
    if not 1 <= bits <= 16 or not 1 <= entries <= len(table):
        raise UnreadableImage("lookup table is shorter than it says")
    out = np.empty(values.size, np.uint16)
    flat = values.reshape(-1)
    for start in range(0, values.size, BLOCK):
        part = np.rint(flat[start : start + BLOCK]).astype(np.int64)
        part -= lowest
        out[start : start + BLOCK] = table[np.clip(part, 0, entries - 1, out=part)]
    return out.reshape(values.shape)


def first(source: Dataset, keyword: str, default: float) -> float:
    """The first of a value that may have several, as a window may."""
    value = source.get(keyword)
    if isinstance(value, MultiValue | list | tuple):
        value = value[0] if value else None
    return default if value is None or value == "" else float(value)


def _table(item: Dataset, entries: int, bits: int) -> NDArray[np.uint16]:
    data = item.LUTData
    if not isinstance(data, bytes):
        return np.atleast_1d(np.asarray(data, dtype=np.int64)).astype(np.uint16)
    packed = bits <= 8 and len(data) <= entries + 1  # two 8-bit entries in each word
    order = ">u2" if item.original_encoding[1] is False else "<u2"
    words = np.frombuffer(data[: len(data) // 2 * 2], order).astype("<u2")
    return words.view(np.uint8).astype(np.uint16) if packed else words


def _none(stored: NDArray[Any]) -> NDArray[np.bool_]:
    """False everywhere, read-only and in no memory."""
    return np.broadcast_to(np.False_, stored.shape)


def _as_stored(ds: Dataset, value: int) -> int:
    """A padding value read with the other sign than the pixels (its VR depends on Pixel Representation)."""
    cells = 1 << int(ds.BitsAllocated)
    if ds.PixelRepresentation == 1:
        return value - cells if value >= cells // 2 else value
    return value % cells
