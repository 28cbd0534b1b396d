"""RT Structure Sets as masks in the geometry of their image (DICOM PS3.3 A.19 and C.8.8.6).

A region of interest is a heap of closed contours, each in one plane, in patient coordinates. A voxel is inside if its
centre is, by the even-odd rule over all contours of its plane, so an inner contour cuts a hole
(C.8.8.6.3); planes that hold no contour are outside, and nothing is interpolated between planes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import RTStructureSetStorage

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.headers import kind_of
from fedmed.imaging.volumes.targets import check_frame_of_reference, classes_of, put_
from fedmed.imaging.volumes.volume import FLIP_XY, Volume

STRUCTURE_SET = str(RTStructureSetStorage)
CLOSED = {"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"}  # points and open lines enclose nothing
FLAT = 0.1  # of a slice: how far the points of a contour may lie from their plane
SAME_PLANE = 0.1  # of a slice: closer contours share a plane
HALF_SPACING = 0.5 + 1e-3  # of a slice: how far a plane may lie from the slice that it is drawn on

Points = NDArray[np.float64]  # (P, 2) row and column of a contour's corners


def read_structures(path: Path, image: Volume, labels: tuple[str, ...] | None = None) -> NDArray[np.int64]:
    """The mask of an image from an RT Structure Set.

    Args:
        path: the object.
        image: what was contoured, not resampled; it may be in canonical orientation.
        labels: see `targets.classes_of`; regions are ROIs, their names ROI Names (3006,0026).

    Returns:
        (D, H, W) class numbers, 0 = background, on the grid of `image`.

    Raises:
        UnreadableImage: another frame of reference; contours that are not parallel to the slices, lie outside the
            image or are further apart than its slices; regions that overlap; or a label that is no region.
    """
    with plain_errors():
        ds = open_dicom(path)
        if kind_of(ds) != STRUCTURE_SET:
            raise UnreadableImage("not a structure set")
        regions = {int(roi.ROINumber): roi for roi in ds.StructureSetROISequence}
        classes = classes_of({number: str(roi.get("ROIName") or "") for number, roi in regions.items()}, labels)
        contours = {int(item.ReferencedROINumber): item for item in ds.get("ROIContourSequence") or ()}
        mask = np.zeros(image.shape, np.int64)
        for number, place in classes.items():
            check_frame_of_reference(str(regions[number].get("ReferencedFrameOfReferenceUID") or ""), image)
            closed = list(_closed(contours[number], image)) if number in contours else []
            if labels is not None and not closed:
                raise UnreadableImage(f"no closed contour for class {place}")
            if closed:
                put_(mask, _filled(closed, image.shape), place)
        return mask


def _closed(roi: Dataset, image: Volume) -> Iterator[NDArray[np.float64]]:
    """(P, 3) corners of each closed contour as indices (d, h, w) of the image."""
    to_index = np.linalg.inv(image.affine) @ FLIP_XY
    for contour in roi.get("ContourSequence") or ():
        if str(contour.get("ContourGeometricType")) not in CLOSED:
            continue
        lps = np.array(contour.ContourData, np.float64).reshape(-1, 3)
        if not np.isfinite(lps).all():
            raise UnreadableImage("contours that are not numbers")
        if len(lps) > 2:
            yield lps @ to_index[:3, :3].T + to_index[:3, 3]


def _filled(contours: list[NDArray[np.float64]], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """(D, H, W) the voxels whose centres the contours enclose."""
    spread = np.max([np.ptp(contour, axis=0) for contour in contours], axis=0)
    axis = int(np.argmin(spread))  # the one across the planes; the first of the grid unless it was turned
    if spread[axis] > FLAT:
        raise UnreadableImage("contours that are not parallel to the slices")
    inside = np.zeros(shape, bool)
    slices = np.moveaxis(inside, axis, 0)
    others = [other for other in range(3) if other != axis]
    for number, plane in _planes(contours, axis, shape[axis]).items():
        slices[number] = even_odd([contour[:, others] for contour in plane], slices.shape[1:])
    return inside


def _planes(contours: list[NDArray[np.float64]], axis: int, length: int) -> dict[int, list[NDArray[np.float64]]]:
    """Slice number to the contours of the plane that is nearest to it."""
    depths = np.array([contour[:, axis].mean() for contour in contours])
    if depths.min() < -HALF_SPACING or depths.max() > length - 1 + HALF_SPACING:
        raise UnreadableImage("contours outside of the image")
    order = np.argsort(depths, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(depths[order]) > SAME_PLANE) + 1])
    planes = [members.tolist() for members in np.split(order, starts[1:])]
    middles = np.array([depths[members].mean() for members in planes])
    if len(planes) > 2 and np.diff(middles).min() > 2 - HALF_SPACING:
        raise UnreadableImage("contours further apart than the slices of the image")
    candidates: dict[int, list[int]] = defaultdict(list)
    for plane, middle in enumerate(middles):
        candidates[int(np.clip(np.floor(middle + 0.5), 0, length - 1))].append(plane)
    return {
        number: [contours[index] for index in planes[min(found, key=lambda plane: abs(middles[plane] - number))]]
        for number, found in candidates.items()
    }


def even_odd(polygons: list[Points], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels whose centre an odd number of polygons encloses, each by the even-odd rule.

    Every edge is crossed by the rows between its ends (lower end included, upper not). A crossing at x turns over all
    pixels whose centre is at x or to the right of it, so a running sum of crossings, modulo two, is the answer.

    Args:
        polygons: (P, 2) corners as (row, column); pixel centres are whole numbers. Any number of them.
        shape: rows, columns.
    """
    height, width = shape
    crossings = np.zeros((height, width + 1), np.int64)
    start = np.concatenate(polygons)  # (edges, 2)
    end = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    first = np.clip(np.ceil(np.minimum(start[:, 0], end[:, 0])), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(start[:, 0], end[:, 0])), 0, height).astype(np.int64)
    counts = last - first  # rows that each edge crosses
    edge = np.repeat(np.arange(len(start)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    (y0, x0), (y1, x1) = start[edge].T, end[edge].T
    x = x0 + (row - y0) / (y1 - y0) * (x1 - x0)
    np.add.at(crossings, (row, np.clip(np.ceil(x), 0, width).astype(np.int64)), 1)
    return np.asarray(np.cumsum(crossings[:, :width], axis=1) % 2 == 1)
