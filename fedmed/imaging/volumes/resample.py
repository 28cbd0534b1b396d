"""Volumes on other grids: another spacing, another volume's grid, another size.

Images are interpolated linearly and edges go on as they end; labels take the nearest voxel, so no class is invented.
An image that becomes coarser is blurred first, for otherwise a thin vessel is there or not by where samples fall. Along
each axis the Gaussian that turns the old voxel's width into the new one's has, in old voxels,

    σ² = (r² − 1) / (8 ln 2)        r = new spacing / old spacing

(Cardoso et al. 2015, "Scale factor point spread function matching", taking a voxel's width as full width at half
maximum). TorchIO does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log, sqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes.volume import MAX_VOXELS, Affine, Volume

Voxel = TypeVar("Voxel", bound=np.generic)

COARSER = 1 + 1e-3  # ratio of spacings: rounding of two equal ones is no reason to blur
EDGE = 1e-6  # of a voxel: a point so close to the edge of the field of view is inside


def resampled(volume: Volume, spacing_mm: Sequence[float], *, labels: bool = False) -> Volume:
    """The volume at another spacing, about the same centre; as many voxels as come closest to the old extent.

    Args:
        volume: image or labels.
        spacing_mm: along d, h, w.
        labels: nearest voxel and the values' own type, instead of linear and float32.

    Raises:
        UnreadableImage: it would have too many voxels.
        ValueError: a spacing that is not positive.
    """
    old, new = np.array(volume.spacing_mm), np.array(spacing_mm, np.float64)
    if new.shape != (3,) or not np.isfinite(new).all() or new.min() <= 0:
        raise ValueError("spacing_mm must be three positive numbers")
    ratio = new / old
    if np.allclose(ratio, 1, rtol=0, atol=1e-6):
        return volume
    shape = np.maximum(1, np.rint(np.array(volume.shape) / ratio)).astype(np.int64)
    index = np.diag([*ratio, 1.0])  # new index to old; the first new voxel keeps the middles together
    index[:3, 3] = (np.array(volume.shape) - 1) / 2 - ratio * (shape - 1) / 2
    _check_room(shape)
    size, affine = tuple(shape.tolist()), volume.affine @ index
    if labels:
        return replace(volume, values=_nearest(volume.values, index, size), padding=None, affine=affine)
    values = np.asarray(volume.values, np.float32)
    for axis in np.argsort(-ratio).tolist():  # what shrinks most goes first, so that the rest has less to do
        values = _along(values, axis, float(ratio[axis]), float(index[axis, 3]), size[axis])
    return _padded(replace(volume, values=values, affine=affine, padding=None), volume, index)


def onto(volume: Volume, target: Volume, *, labels: bool = False) -> Volume:
    """The volume on another one's grid, whatever its orientation and spacing.

    Beyond its field of view an image has its lowest value and is padding, and labels are 0.

    Args:
        volume: image or labels.
        target: whose grid; its values are not used.
        labels: nearest voxel, instead of linear.
    """
    index = np.linalg.inv(volume.affine) @ target.affine  # target index to index
    if labels:
        values = _nearest(volume.values, index, target.shape)
        return replace(volume, values=values, padding=None, affine=target.affine)
    smooth = _blurred(np.asarray(volume.values, np.float32), index)
    matrix, offset = index[:3, :3], index[:3, 3]
    values = ndimage.affine_transform(smooth, matrix, offset, target.shape, np.float32, order=1, mode="nearest")
    return _padded(replace(volume, values=values, affine=target.affine, padding=None), volume, index)


def recentred(volume: Volume, size: Sequence[int], *, fill: float | None = None) -> Volume:
    """`cropped_or_padded`, and the affine follows.

    Args:
        volume: image or labels.
        size: voxels along d, h, w.
        fill: value around the volume, None = its lowest.
    """
    value = volume.values.min() if fill is None else fill
    shift = np.eye(4)
    shift[:3, 3] = [_start(old, new) for old, new in zip(volume.shape, size, strict=True)]
    inside = np.zeros(volume.shape, bool) if volume.padding is None else volume.padding
    padding = cropped_or_padded(inside, size, fill=True)
    return replace(
        volume,
        values=cropped_or_padded(volume.values, size, fill=value),
        padding=padding if padding.any() else None,
        affine=volume.affine @ shift,
    )


def cropped_or_padded(array: NDArray[Voxel], size: Sequence[int], *, fill: float = 0) -> NDArray[Voxel]:
    """The middle of an array, or the array in the middle: each of the last three axes as it needs.

    Args:
        array: (…, D, H, W).
        size: wanted lengths of d, h, w.
        fill: value around the array.

    Returns:
        (…, *size), a copy.
    """
    lead = array.shape[:-3]
    out = np.full((*lead, *size), fill, array.dtype)
    source: list[Any] = [...]
    target: list[Any] = [...]
    for old, new in zip(array.shape[-3:], size, strict=True):
        start = _start(old, new)
        source.append(slice(max(start, 0), min(start + new, old)))
        target.append(slice(max(-start, 0), max(-start, 0) + min(old, new)))
    out[tuple(target)] = array[tuple(source)]
    return out


def _start(old: int, new: int) -> int:
    """Index in the old axis of the new one's first voxel; negative where voxels are added."""
    return (old - new) // 2 if old >= new else -((new - old) // 2)


def _along(values: NDArray[np.float32], axis: int, ratio: float, start: float, length: int) -> NDArray[np.float32]:
    """One axis, blurred if it becomes coarser and sampled linearly at start, start + ratio and so on."""
    smooth = ndimage.gaussian_filter1d(values, _sigma(ratio), axis, mode="nearest") if ratio > COARSER else values
    last = values.shape[axis] - 1
    place = np.clip(start + ratio * np.arange(length), 0, last)
    before = np.minimum(place.astype(np.int64), max(last - 1, 0))
    weight = (place - before).astype(np.float32).reshape([-1 if other == axis else 1 for other in range(3)])
    first = np.take(smooth, before, axis)
    out = np.take(smooth, np.minimum(before + 1, last), axis)
    out -= first
    out *= weight
    out += first
    return np.asarray(out, np.float32)


def _padded(new: Volume, old: Volume, index: Affine) -> Volume:
    """Padding of the old volume, and all beyond its field of view, in the new one."""
    padding = _outside(old.shape, index, new.shape)
    if old.padding is not None:
        padding |= _nearest(old.padding, index, new.shape)
    if not padding.any():
        return new
    values = np.where(padding, old.values.min(), new.values)
    return replace(new, values=values, padding=padding)


def _check_room(shape: NDArray[np.int64]) -> None:
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise UnreadableImage(f"more than {MAX_VOXELS >> 20} million voxels")


def _sigma(ratio: float) -> float:
    return sqrt((ratio**2 - 1) / (8 * log(2)))


def _blurred(values: NDArray[np.float32], index: Affine) -> NDArray[np.float32]:
    """Against aliasing, along each axis that is sampled more coarsely than it is stored."""
    ratios = np.abs(index[:3, :3]).max(axis=1).tolist()  # old voxels between neighbouring samples
    sigmas = [_sigma(ratio) if ratio > COARSER else 0.0 for ratio in ratios]
    return np.asarray(ndimage.gaussian_filter(values, sigmas, mode="nearest")) if any(sigmas) else values


def _nearest(values: NDArray[Voxel], index: Affine, size: tuple[int, ...]) -> NDArray[Voxel]:
    """Each sample from the voxel in which it lies; 0 or False outside."""
    outside = _outside(values.shape, index, size)
    places = []
    for axis, length in enumerate(values.shape):
        places.append(np.clip(np.floor(_coordinate(index, axis, size) + 0.5 + EDGE), 0, length - 1).astype(np.int32))
    out = values[tuple(places)]
    out[outside] = 0
    return out


def _outside(shape: tuple[int, ...], index: Affine, size: tuple[int, ...]) -> NDArray[np.bool_]:
    """(size) samples beyond the outer faces of the outer voxels."""
    outside = np.zeros(size, bool)
    for axis, length in enumerate(shape):
        place = _coordinate(index, axis, size)
        outside |= (place < -0.5 - EDGE) | (place > length - 0.5 + EDGE)
    return outside


def _coordinate(index: Affine, axis: int, size: tuple[int, ...]) -> NDArray[Any]:
    """Old coordinate along one axis of every sample, broadcastable to (size): zero terms are left out."""
    total: NDArray[Any] = np.full((1, 1, 1), index[axis, 3])
    for new, length in enumerate(size):
        if index[axis, new] != 0:
            steps = np.arange(length) * index[axis, new]
            total = total + steps.reshape([-1 if axis_ == new else 1 for axis_ in range(3)])
    return total
