"""The pixels of a group of slices, in the units of their modality."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.frames import frame_values, in_hounsfield, transformation
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.volumes.slices import Group
from fedmed.imaging.volumes.volume import Volume


def decoded(group: Group) -> Volume:
    """Read the slices of a group, each with its own rescale (in PET every slice has another slope).

    Padding is set to the lowest value of the image, so that interpolation draws no edge of -2000 HU around it.

    Raises:
        UnreadableImage: a slice cannot be decoded.
    """
    first = group.slices[0]
    shape = (len(group.slices), *first.shape)
    values, padding = np.empty(shape, np.float32), np.zeros(shape, bool)
    wanted: dict[Path, dict[int, int]] = defaultdict(dict)  # file -> frame -> place
    for place, one in enumerate(group.slices):
        wanted[one.file][one.frame] = place
    hounsfield = first.modality == "CT"
    turned: set[bool] = set()
    for file, places in wanted.items():
        left = dict(places)
        ds = open_dicom(file)
        for number, frame in enumerate(frame_values(ds)):
            place = left.pop(number, -1)
            if place >= 0:
                hounsfield = hounsfield and in_hounsfield(transformation(ds, number))
                if frame.values.shape != first.shape or not np.isfinite(frame.values).all():
                    raise UnreadableImage("pixels that do not fit the header")
                values[place], padding[place] = frame.values, frame.padding
                turned.add(frame.lowest_is_white)
            if not left:
                break
        if left:
            raise UnreadableImage("fewer frames than its header declares")
    if len(turned) > 1 and not hounsfield:
        raise UnreadableImage("slices of which some show low values as white, others as black")
    if padding.any():
        values[padding] = values[~padding].min() if not padding.all() else 0
    return Volume(
        values=values,
        affine=group.affine,
        padding=padding if padding.any() else None,
        modality=first.modality,
        units="HU" if hounsfield else "",
        lowest_is_white=turned == {True},
        frame_of_reference=first.frame_of_reference,
    )
