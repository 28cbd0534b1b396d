"""Grey frames in the units of their modality, one at a time, so that memory holds one frame and not the object.

Enhanced objects say slope, intercept and window for each frame or for all in functional groups (DICOM PS3.3
C.7.6.16); the others say it once, at the top.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.modality import Plane, modality_values, padding_mask
from fedmed.imaging.dicom.pixels import check_grey, declared
from fedmed.imaging.plain_errors import plainly

HOUNSFIELD = ("HU", "HU_MOD", "US", "")  # Rescale Type (0028,1054); US is "unspecified", and CT without a type has HU


@dataclass(frozen=True, kw_only=True)
class FrameValues:
    """One grey frame."""

    values: Plane  # (H, W) in the units of the modality: HU for CT
    padding: NDArray[np.bool_]  # (H, W) pixels outside the image
    lowest_is_white: bool  # how `values` are to be shown; they are not inverted


def frame_values(ds: Dataset) -> Iterator[FrameValues]:
    """Every frame of a grey object, after modality LUT or rescale (PS3.3 C.11.1, per frame C.7.6.16.2.9).

    Args:
        ds: an object with its pixels. Whether its kind may be used at all is for `kinds.check_kind` to say.

    Raises:
        UnreadableImage: on the first frame if the header is wrong, later if a frame cannot be decoded.
    """
    return plainly(_frame_values(ds))


def functional_group(ds: Dataset, index: int, keyword: str) -> Dataset | None:
    """One frame's functional group, its own before the one that all share (C.7.6.16); None if there is neither."""
    groups = ds.get("PerFrameFunctionalGroupsSequence") or []
    shared = ds.get("SharedFunctionalGroupsSequence") or []
    for group in (*groups[index : index + 1], *shared[:1]):
        sequence = group.get(keyword)
        if sequence:
            found: Dataset = sequence[0]
            return found
    return None


def transformation(ds: Dataset, index: int) -> Dataset:
    """Where slope and intercept of a frame stand: its Pixel Value Transformation, else the object itself."""
    found = functional_group(ds, index, "PixelValueTransformationSequence")
    return ds if found is None else found


def in_hounsfield(source: Dataset) -> bool:
    """Whether CT values were rescaled to Hounsfield units (C.11.1.1.2); else they are the scanner's own numbers.

    Args:
        source: where slope and intercept stand, see `transformation`.
    """
    rescaled = source.get("RescaleSlope") is not None and source.get("RescaleIntercept") is not None
    return rescaled and str(source.get("RescaleType") or "").strip().upper() in HOUNSFIELD


def values_of_interest(ds: Dataset, index: int) -> Dataset:
    """Where the window of a frame stands: its Frame VOI LUT (C.7.6.16.2.10), else the object itself."""
    found = functional_group(ds, index, "FrameVOILUTSequence")
    return ds if found is None else found


def pixel_sides(ds: Dataset) -> tuple[float, float]:
    """Distances of rows and of columns: mm, or no more than their ratio; 1 and 1 where an object does not say.

    Pixel Spacing (PS3.3 10.7.1.3, in enhanced objects C.7.6.16.2.1), else what stands in its place in projections, else
    Pixel Aspect Ratio, which is for objects without any of them (C.7.6.3.1.7).
    """
    measures = functional_group(ds, 0, "PixelMeasuresSequence")
    sources = (ds,) if measures is None else (measures, ds)
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        for source in sources:
            with suppress(TypeError, ValueError):  # not said, or no two numbers
                row, column = source.get(name)
                return float(row), float(column)
    return 1.0, 1.0


def lowest_is_white(ds: Dataset) -> bool:
    """Whether the picture is to be inverted, once.

    MONOCHROME1 (C.7.6.3.1.2) and Presentation LUT Shape INVERSE (C.11.6, for DX C.8.11.3.1.2) say the same thing, and
    a DX image that says one must say the other.
    """
    return bool(ds.PhotometricInterpretation == "MONOCHROME1" or ds.get("PresentationLUTShape") == "INVERSE")


def _frame_values(ds: Dataset) -> Iterator[FrameValues]:
    claims = declared(ds)
    check_grey(claims)
    for index, stored in zip(range(claims.frames), stored_frames(ds), strict=False):
        yield FrameValues(
            values=modality_values(transformation(ds, index), stored),
            padding=padding_mask(ds, stored),
            lowest_is_white=lowest_is_white(ds),
        )
