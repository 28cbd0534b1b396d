"""One row of a manifest in three dimensions: slices, whole volumes, and frames. See `items`, which calls this."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.items import (
    Arrays,
    Classes,
    Unit,
    checked,
    is_nifti,
    needs_eight_bits_only,
    quantised,
    squares,
)
from fedmed.imaging.reading import read_frames, to_unit_range
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.resize import letterbox, letterbox_mask
from fedmed.imaging.volumes import read_mask_volume, read_volume
from fedmed.imaging.volumes.headers import ENHANCED, kind_of
from fedmed.imaging.volumes.resample import cropped_or_padded, resampled
from fedmed.imaging.volumes.volume import Volume, canonical


def slices(image: Path, mask: Path | None, recipe: Recipe) -> Arrays:
    """The slices of a volume along its depth, or the frames of a cine, (n, C, S, S)."""
    if not _is_volume(image):
        if mask is not None:
            raise UnreadableImage("masks of frames are not supported; a mask needs a volume or a single picture")
        frames = [squares(pixels[None], None, recipe)["images"] for pixels in read_frames(image, recipe.preset)]
        if len({frame.dtype for frame in frames}) > 1:  # a blank frame needs fewer bits than the others
            frames = [frame.astype(np.uint16) * 257 if frame.dtype == np.uint8 else frame for frame in frames]
        return {"images": np.concatenate(frames)}
    values, classes, eight_bits = _volume_and_mask(image, mask, recipe)
    planes = letterbox(values, recipe.image_size)  # the slices take the place of channels
    arrays: Arrays = {"images": quantised(planes[:, None], eight_bits=eight_bits)}
    if classes is not None:
        arrays["masks"] = letterbox_mask(classes, recipe.image_size)[:, None]
    return arrays


def volume(image: Path, mask: Path | None, recipe: Recipe) -> Arrays:
    """One volume, cropped or padded at its centre if the recipe has a size, (1, 1, D, H, W)."""
    values, classes, eight_bits = _volume_and_mask(image, mask, recipe)
    if recipe.volume_size:
        values = cropped_or_padded(values, recipe.volume_size)
        classes = None if classes is None else cropped_or_padded(classes, recipe.volume_size)
    arrays: Arrays = {"images": quantised(values[None, None], eight_bits=eight_bits)}
    if classes is not None:
        arrays["masks"] = np.ascontiguousarray(classes[None, None])
    return arrays


def _is_volume(path: Path) -> bool:
    """Whether slices lie somewhere; else they are the frames of one object, or a picture."""
    if path.is_dir() or is_nifti(path):
        return True
    return is_dicom(path) and kind_of(open_dicom(path)) in ENHANCED


def _volume_and_mask(image: Path, mask: Path | None, recipe: Recipe) -> tuple[Unit, Classes | None, bool]:
    """Values (D, H, W) in canonical orientation at the recipe's spacing, classes, and whether 8 bits are enough.

    Values are put into [0, 1] before they are resampled: what lies beyond the window (metal, the padding around a CT's
    circle) means nothing to the preset, and would bleed into its neighbours otherwise.
    """
    volume = read_volume(image)
    if recipe.preset.startswith("ct-") and volume.modality not in ("CT", ""):
        raise UnreadableImage("not a CT, which the preset is for")
    classes = None
    if mask is not None:
        numbers = checked(read_mask_volume(mask, volume, recipe.regions), volume.values.shape, recipe, unit="voxels")
        classes = canonical(replace(volume, values=numbers, padding=None))
    valid = None if volume.padding is None else ~volume.padding
    unit = to_unit_range(volume.values, recipe.preset, valid=valid)
    eight_bits = needs_eight_bits_only(unit)
    shown = canonical(replace(volume, values=unit, padding=None))
    if recipe.spacing_mm:
        shown = resampled(shown, recipe.spacing_mm)
        classes = None if classes is None else resampled(classes, recipe.spacing_mm, labels=True)
    return shown.values, None if classes is None else _bytes(classes), eight_bits


def _bytes(classes: Volume) -> Classes:
    numbers: Classes = classes.values.astype(np.uint8)
    return numbers
