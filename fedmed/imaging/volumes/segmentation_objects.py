"""DICOM Segmentation objects as masks in the geometry of their image (DICOM PS3.3 A.51 and C.8.20).

Frames without a voxel of a segment are left out of such objects, their order is free, and they may cover a part of
the image only. So each frame is placed by its own position; what no frame says is background.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.frames import functional_group
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.dicom.pixels import declared
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.geometry import affine_of
from fedmed.imaging.volumes.headers import frame_plane, kind_of
from fedmed.imaging.volumes.targets import check_frame_of_reference, classes_of, put_
from fedmed.imaging.volumes.volume import Affine, Volume

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"  # Label Map Segmentation Storage, which pydicom 3.0 does not name
SEGMENTATIONS = (str(SegmentationStorage), LABEL_MAP)
OFF_GRID = 0.1  # of a voxel: positions are written with few digits
HALF = 0.5  # of Maximum Fractional Value (0062,000E): from here on a voxel belongs to the segment

Region = NDArray[np.bool_]
Voxels = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def read_segmentation(path: Path, image: Volume, labels: tuple[str, ...] | None = None) -> NDArray[np.int64]:
    """The mask of an image from a DICOM SEG: binary, fractional (from one half on) or label map.

    Args:
        path: the object.
        image: what was segmented, not resampled; it may be in canonical orientation.
        labels: see `targets.classes_of`; regions are segments, their names Segment Labels (0062,0005).

    Returns:
        (D, H, W) class numbers, 0 = background, on the grid of `image`.

    Raises:
        UnreadableImage: another frame of reference, orientation, spacing or grid; voxels outside of the image;
            segments that overlap; or a label that is no segment.
    """
    with plain_errors():
        ds = open_dicom(path)
        if kind_of(ds) not in SEGMENTATIONS:
            raise UnreadableImage("not a segmentation object")
        check_frame_of_reference(str(ds.get("FrameOfReferenceUID") or ""), image)
        segments = {int(one.SegmentNumber): str(one.get("SegmentLabel") or "") for one in ds.SegmentSequence}
        segments.pop(0, None)  # the background of a label map
        classes = classes_of(segments, labels)
        to_index: Affine = np.asarray(np.linalg.inv(image.affine), np.float64)
        mask = np.zeros(image.shape, np.int64)
        for frame, pixels in enumerate(_frames(ds)):
            for segment, inside in _regions(ds, frame, pixels):
                if segment in classes and inside.any():
                    put_(mask, _voxels(ds, frame, inside, to_index, image.shape), classes[segment])
        return mask


def _frames(ds: Dataset) -> Iterator[NDArray[Any]]:
    """(H, W) pixels of every frame.

    Frames of single bits follow each other without a gap (PS3.5 8.1.1), so most begin within a byte; there pydicom 3.0
    loses the bits of the byte before.
    """
    claims = declared(ds)
    if claims.allocated > 1 or claims.syntax.is_encapsulated or not claims.syntax.is_little_endian:
        yield from stored_frames(ds)
        return
    packed, size = np.frombuffer(ds.PixelData, np.uint8), claims.rows * claims.columns
    for start in range(0, claims.frames * size, size):
        bits = np.unpackbits(packed[start // 8 : (start + size + 7) // 8], bitorder="little")
        yield bits[start % 8 : start % 8 + size].reshape(claims.rows, claims.columns)


def _regions(ds: Dataset, frame: int, pixels: NDArray[Any]) -> Iterator[tuple[int, Region]]:
    """Segment numbers in a frame, and where they are (C.8.20.2.3, label maps C.8.20.2.4)."""
    kind = str(ds.get("SegmentationType") or "")
    if kind == "LABELMAP":
        background = {0, int(ds.get("PixelPaddingValue") or 0)}
        for segment in np.unique(pixels):
            if int(segment) not in background:
                yield int(segment), pixels == segment
        return
    item = functional_group(ds, frame, "SegmentIdentificationSequence")
    if item is None:
        raise UnreadableImage("a frame of no segment")
    if kind == "FRACTIONAL":
        yield int(item.ReferencedSegmentNumber), np.asarray(pixels >= HALF * int(ds.MaximumFractionalValue))
    elif kind == "BINARY":
        yield int(item.ReferencedSegmentNumber), pixels != 0
    else:
        raise UnreadableImage("unknown type of segmentation")


def _voxels(ds: Dataset, frame: int, inside: Region, to_index: Affine, shape: tuple[int, int, int]) -> Voxels:
    """Indices of the voxels under a frame's pixels."""
    plane = frame_plane(ds, frame)
    if plane is None:
        raise UnreadableImage("frames that do not say where they lie")
    placed = to_index @ affine_of(plane, np.zeros(3))  # (anything, row, column, 1) to voxel index
    down, across, first = placed[:3, 1], placed[:3, 2], placed[:3, 3]
    rows, columns = np.nonzero(inside)
    exact = first[:, None] + down[:, None] * rows + across[:, None] * columns  # (3, pixels)
    index = np.rint(exact).astype(np.int64)
    lengths = np.abs(np.stack([down, across])).max(axis=1)  # 1 along an axis of the image
    if np.abs(lengths - 1).max() > OFF_GRID or np.abs(exact - index).max() > OFF_GRID:
        raise UnreadableImage("a segmentation with another orientation, spacing or grid than its image")
    if (index < 0).any() or (index >= np.array(shape)[:, None]).any():
        raise UnreadableImage("a segmentation that reaches beyond its image")
    return index[0], index[1], index[2]
