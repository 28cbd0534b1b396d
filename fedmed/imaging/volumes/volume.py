"""A volume: values on a regular grid, and where that grid lies in the patient.

Axes are (d, h, w): slice, row, column. The affine maps an index (d, h, w, 1) to millimetres in the patient, RAS: x to
the right, y to the front, z to the head, as in NIfTI. DICOM counts x to the left and y to the back (LPS; PS3.3
C.7.6.2.1.1); only the first two signs differ, and `FLIP_XY` turns either into the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from fedmed.errors import UnreadableImage

Affine = NDArray[np.float64]
FLIP_XY = np.diag([-1.0, -1.0, 1.0, 1.0])  # LPS to RAS, and back
MAX_VOXELS = 2**29  # 2 GiB of float32: 2048 slices of 512 by 512
GRID_TOLERANCE = 0.05  # of a voxel, at the furthest corner: writers round; half a voxel off is another grid


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Values on a regular grid. Arrays are shared, never changed in place.

    Attributes:
        values: (D, H, W) float32 in the units of the modality (HU for CT), or integers for labels.
        affine: (4, 4) float64, index (d, h, w, 1) to patient RAS mm.
        padding: (D, H, W) True outside the image; None = nowhere. Values there are the lowest of the image.
        modality: DICOM's (0008,0060), such as "CT"; "" where the file does not say.
        units: "HU" for CT whose every slice says so; "" for all else, and where the file does not say.
        lowest_is_white: how the values are to be shown; they are not inverted.
        frame_of_reference: DICOM's (0020,0052), "" where there is none; it stays at the site.
    """

    values: NDArray[Any] = field(repr=False)
    affine: Affine
    padding: NDArray[np.bool_] | None = field(default=None, repr=False)
    modality: str = ""
    units: str = ""
    lowest_is_white: bool = False
    frame_of_reference: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no volume.

        Raises:
            UnreadableImage: wrong shapes, or an affine that squashes the grid or is not finite.
        """
        if self.values.ndim != 3 or not self.values.size:
            raise UnreadableImage("not three-dimensional")
        if self.padding is not None and self.padding.shape != self.values.shape:
            raise UnreadableImage("padding of another shape than the volume")
        check_affine(self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """D, H, W."""
        depth, height, width = self.values.shape
        return depth, height, width

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along d, h and w."""
        depth, height, width = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return depth, height, width


def check_affine(affine: Affine) -> None:
    """Refuse an affine that is not finite, not affine, or maps the grid onto a plane.

    Raises:
        UnreadableImage: it is one of these.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or (affine[3] != (0, 0, 0, 1)).any():
        raise UnreadableImage("no usable affine")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise UnreadableImage("an affine that squashes the volume")


def canonical(volume: Volume) -> Volume:
    """The same voxels in the order of axes closest to (head, front, right): d up, h to the front, w to the right.

    This is nibabel's `as_closest_canonical` (RAS+) with the axes in this package's order, hence what nnU-Net, MONAI
    and TorchIO call canonical. Axes are swapped and turned round, nothing is interpolated; the affine follows. On a
    screen such an axial slice stands upside down, so a report has to turn it.
    """
    axes, signs = _orientation(volume.affine)
    order = tuple(int(np.flatnonzero(axes == world)[0]) for world in (2, 1, 0))
    return _turned(volume, order, tuple(new for new, old in enumerate(order) if signs[old] < 0))


def in_order_of(volume: Volume, target: Volume) -> Volume:
    """The same voxels in the order of axes of another volume, if both grids run along the same ones; else as it was.

    Nothing is interpolated, and whether both are one grid afterwards is for `like` to say.
    """
    turn = np.rint(np.linalg.inv(volume.affine) @ target.affine)[:3, :3]  # axes of the target to the volume's
    if (np.abs(turn) @ np.abs(turn).T != np.eye(3)).any():
        return volume
    order = tuple(np.abs(turn).argmax(axis=0).tolist())
    return _turned(volume, order, tuple(new for new, old in enumerate(order) if turn[old, new] < 0))


def _turned(volume: Volume, order: tuple[int, ...], flips: tuple[int, ...]) -> Volume:
    """The same voxels with other axes.

    Args:
        volume: as it was.
        order: which old axis becomes d, h, w.
        flips: those of the new axes that are turned round.
    """
    transform = np.zeros((4, 4))  # new index to old index
    transform[3, 3] = 1
    for new, old in enumerate(order):
        transform[old, new] = -1 if new in flips else 1
        transform[old, 3] = volume.shape[old] - 1 if new in flips else 0

    def turned(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(np.flip(array.transpose(order), flips))

    return replace(
        volume,
        values=turned(volume.values),
        padding=None if volume.padding is None else turned(volume.padding),
        affine=volume.affine @ transform,
    )


def like(volume: Volume, target: Volume) -> bool:
    """Whether both lie on the same grid: equal shapes, and no corner further apart than `GRID_TOLERANCE` voxels."""
    if volume.shape != target.shape:
        return False
    corners = np.array(np.meshgrid(*((0, length - 1) for length in target.shape), [1])).reshape(4, 8)
    index = np.linalg.inv(target.affine) @ volume.affine @ corners
    return bool(np.abs(index - corners).max() <= GRID_TOLERANCE)


def _orientation(affine: Affine) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of d, h, w the patient axis (0 right, 1 front, 2 head) that it runs along, and its sign."""
    found: NDArray[np.int64] = io_orientation(affine).astype(np.int64)  # type: ignore[no-untyped-call]  # nibabel annotates nothing
    return found[:, 0], found[:, 1]
