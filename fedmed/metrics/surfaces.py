"""Distances between the surfaces of two masks, in mm: HD95 and ASSD, in two and three dimensions.

The surface of a mask is the mask without its erosion by one voxel in each direction along the axes: its voxels with a
face (in two dimensions, an edge) on the background or on the border of the image. Distances run from voxel centre to
voxel centre. Both metrics are undefined where a mask is empty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt

from fedmed.metrics.ranking import Array

Mask = NDArray[np.bool_]
PERCENTILE = 95


class SurfaceScores(NamedTuple):
    """How far two surfaces are apart; NaN if a mask is empty."""

    hd95: float  # mm
    assd: float  # mm


def surface_scores(first: Mask, second: Mask, spacing_mm: Array) -> SurfaceScores:
    """Returns HD95 and ASSD of two masks, the same in either order.

    HD95 is the larger of the two directed 95th percentiles (interpolated linearly), and not the percentile of both
    directions' distances together. ASSD is the mean of both directions' distances together: (Σ d(a, B) + Σ d(b, A)) /
    (|A| + |B|) for surface voxels a of A and b of B (Yeghiazaryan and Voiculescu 2018, doi:10.1117/1.JMI.5.1.015006).

    Args:
        first: (H, W) or (D, H, W).
        second: Of the same shape.
        spacing_mm: Distance of neighbouring voxels along each axis.
    """
    if not (first.any() and second.any()):
        return SurfaceScores(np.nan, np.nan)
    there, back = surface_distances(first, second, spacing_mm)
    hd95 = max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE))
    return SurfaceScores(float(hd95), float((there.sum() + back.sum()) / (len(there) + len(back))))


def surface_distances(first: Mask, second: Mask, spacing_mm: Array) -> tuple[Array, Array]:
    """Returns the distance of each surface voxel of one mask to the nearest one of the other, in both directions.

    Args:
        first: Not empty.
        second: Of the same shape, not empty.
        spacing_mm: Distance of neighbouring voxels along each axis.
    """
    box = bounding_box(first | second)  # beyond it lies background only, so that surfaces and distances are the same
    here, there = surface(first[box]), surface(second[box])
    to_there: Array = distance_transform_edt(~there, sampling=spacing_mm)[here]
    to_here: Array = distance_transform_edt(~here, sampling=spacing_mm)[there]
    return to_there, to_here


def surface(mask: Mask) -> Mask:
    """Returns the voxels of a mask that are not all of its erosion; beyond the image lies background."""
    edge: Mask = mask & ~binary_erosion(mask)  # scipy's defaults: the cross of nearest neighbours, border value 0
    return edge


def bounding_box(mask: Mask) -> tuple[slice, ...]:
    """Returns the smallest box around the voxels of a mask that is not empty."""
    axes = range(mask.ndim)
    found = [np.flatnonzero(mask.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(int(place[0]), int(place[-1]) + 1) for place in found)
