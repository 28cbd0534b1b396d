"""What segmentation objects and structure sets share: which of their regions is which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes.volume import Volume

OVERLAP = "regions overlap, and a voxel can have one class only"
Region = NDArray[np.bool_] | tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def classes_of(names: Mapping[int, str], labels: Sequence[str] | None) -> dict[int, int]:
    """The class of every region that is asked for.

    Args:
        names: of the regions, by their numbers in the file.
        labels: names of classes 1, 2, …, each the name of a region in any case, or its number; None = all regions,
            in the order of their numbers.

    Returns:
        Region number to class number.

    Raises:
        UnreadableImage: a label names no region or several.
    """
    if labels is None:
        return {number: place for place, number in enumerate(sorted(names), start=1)}
    classes: dict[int, int] = {}
    for place, label in enumerate(labels, start=1):
        found = [number for number, name in names.items() if name.strip().casefold() == label.strip().casefold()]
        if not found and label.strip().isdigit():
            found = [number for number in names if number == int(label)]
        if len(found) != 1:
            raise UnreadableImage(f"{'no region' if not found else 'several regions'} for class {place}")
        if found[0] in classes:
            raise UnreadableImage(f"classes {classes[found[0]]} and {place} are one region")
        classes[found[0]] = place
    return classes


def check_frame_of_reference(uid: str, image: Volume) -> None:
    """Refuse a target in another coordinate system; positions in it mean other places (PS3.3 C.7.4.1).

    Raises:
        UnreadableImage: both say which system they are in, and it is not the same one.
    """
    if uid and image.frame_of_reference and uid != image.frame_of_reference:
        raise UnreadableImage("another frame of reference than its image")


def put_(mask: NDArray[np.int64], region: Region, number: int) -> None:
    """Write one class into a mask of class numbers.

    Args:
        mask: (D, H, W).
        region: where, as booleans of that shape or as indices.
        number: of the class.

    Raises:
        UnreadableImage: a voxel belongs to another class already.
    """
    taken = mask[region]
    if ((taken != 0) & (taken != number)).any():
        raise UnreadableImage(OVERLAP)
    mask[region] = number
