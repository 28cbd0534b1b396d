"""One door: whatever a manifest may name as a volume or as its mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.enhanced import read_enhanced
from fedmed.imaging.volumes.headers import kind_of
from fedmed.imaging.volumes.nifti import read_nifti
from fedmed.imaging.volumes.segmentation_objects import SEGMENTATIONS, read_segmentation
from fedmed.imaging.volumes.series import read_series
from fedmed.imaging.volumes.structures import STRUCTURE_SET, read_structures
from fedmed.imaging.volumes.volume import Volume, in_order_of, like


def read_volume(path: Path) -> Volume:
    """Read a volume as it is stored: orientation and spacing are the file's.

    Args:
        path: the folder of one DICOM series, an enhanced multi-frame DICOM file, or a NIfTI.

    Raises:
        UnreadableImage: for whatever reason it makes no regular volume. The message names neither file nor patient.
    """
    with plain_errors():
        if path.is_dir():
            return read_series(path)
        return read_enhanced(path) if is_dicom(path) else read_nifti(path)


def read_mask_volume(path: Path, image: Volume, labels: tuple[str, ...] | None = None) -> NDArray[np.int64]:
    """Read the mask of a volume.

    Args:
        path: a NIfTI of class numbers, a DICOM segmentation or RT structure set (or a folder that holds nothing but
            one), or a folder or multi-frame file whose pixels are class numbers.
        image: as `read_volume` gives it.
        labels: names or numbers of the segments or ROIs that are classes 1, 2, …; None = all, by their numbers. Files
            of class numbers are taken as they are; they may have their axes in another order.

    Returns:
        (D, H, W) class numbers, on the grid of `image`.

    Raises:
        UnreadableImage: it cannot be read, or does not lie on the grid of its image.
    """
    with plain_errors():
        path = _only_file(path)
        if not path.is_dir() and is_dicom(path):
            kind = kind_of(open_dicom(path))
            if kind in SEGMENTATIONS:
                return read_segmentation(path, image, labels)
            if kind == STRUCTURE_SET:
                return read_structures(path, image, labels)
        mask = in_order_of(read_nifti(path, labels=True) if _is_nifti(path) else read_volume(path), image)
        if mask.shape != image.shape:
            raise UnreadableImage(f"the mask is {_size(mask)} voxels, its image {_size(image)}")
        if not like(mask, image):
            raise UnreadableImage("the mask lies on another grid than its image")
        whole = np.rint(mask.values)
        if np.abs(mask.values - whole).max() > 1e-3:
            raise UnreadableImage("a mask with values that are no class numbers")
        return np.asarray(whole, np.int64)


def _only_file(path: Path) -> Path:
    """The file itself where a folder holds one alone, as exports of segmentations do."""
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    return files[0] if len(files) == 1 else path


def _is_nifti(path: Path) -> bool:
    return not path.is_dir() and not is_dicom(path)


def _size(volume: Volume) -> str:
    return " by ".join(map(str, volume.shape))
