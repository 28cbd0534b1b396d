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
    Modalities,
    Unit,
    checked,
    is_nifti,
    needs_eight_bits_only,
    quantised,
    squares,
)
from fedmed.imaging.reading import NOT_HOUNSFIELD, preset_named, read_aspect, read_frames, to_unit_range
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.resize import aspect_of, letterbox, letterbox_mask
from fedmed.imaging.volumes import read_mask_volume, read_volume
from fedmed.imaging.volumes.headers import ENHANCED, kind_of
from fedmed.imaging.volumes.resample import cropped_or_padded, onto, resampled
from fedmed.imaging.volumes.volume import Volume, canonical, like


def slices(modalities: Modalities, mask: Path | None, recipe: Recipe) -> Arrays:
    """The slices of a volume along its depth, or the frames of a cine, (n, C, S, S)."""
    image = next(image for image in modalities if image is not None)
    if not is_volume(image):
        if len(modalities) > 1:
            raise UnreadableImage("several modalities of frames are not supported; they need volumes or pictures")
        if mask is not None:
            raise UnreadableImage("masks of frames are not supported; a mask needs a volume or a single picture")
        aspect = read_aspect(image)
        frames = [squares(frame[None], None, recipe, aspect)["images"] for frame in read_frames(image, recipe.preset)]
        if len({frame.dtype for frame in frames}) > 1:  # a blank frame needs fewer bits than the others
            frames = [frame.astype(np.uint16) * 257 if frame.dtype == np.uint8 else frame for frame in frames]
        return {"images": np.concatenate(frames)}
    values, classes, eight_bits, aspect = _volumes_and_mask(modalities, mask, recipe)
    size = recipe.image_size
    planes = np.stack([letterbox(channel, size, aspect) for channel in values], axis=1)  # slices as its channels
    arrays: Arrays = {"images": quantised(planes, eight_bits=eight_bits)}
    if classes is not None:
        arrays["masks"] = letterbox_mask(classes, size, aspect)[:, None]
    return arrays


def volume(modalities: Modalities, mask: Path | None, recipe: Recipe) -> Arrays:
    """One volume, cropped or padded at its centre if the recipe has a size, (1, C, D, H, W)."""
    values, classes, eight_bits, _ = _volumes_and_mask(modalities, mask, recipe)
    if recipe.volume_size:
        values = cropped_or_padded(values, recipe.volume_size)
        classes = None if classes is None else cropped_or_padded(classes, recipe.volume_size)
    arrays: Arrays = {"images": quantised(values[None], eight_bits=eight_bits)}
    if classes is not None:
        arrays["masks"] = np.ascontiguousarray(classes[None, None])
    return arrays


def is_volume(path: Path) -> bool:
    """Whether slices lie somewhere; else they are the frames of one object, or a picture."""
    if path.is_dir() or is_nifti(path):
        return True
    return is_dicom(path) and kind_of(open_dicom(path)) in ENHANCED


def _volumes_and_mask(
    modalities: Modalities, mask: Path | None, recipe: Recipe
) -> tuple[Unit, Classes | None, bool, float]:
    """Values (C, D, H, W) in canonical orientation at the recipe's spacing, classes, whether 8 bits are enough, aspect.

    The first modality that is there decides the grid, and the mask lies on it as stored; others are put onto it.
    """
    present = [(place, image) for place, image in enumerate(modalities) if image is not None]
    (place, image), *others = present
    first = read_volume(image)
    classes = None
    if mask is not None:
        numbers = checked(read_mask_volume(mask, first, recipe.regions), first.values.shape, recipe, unit="voxels")
        classes = canonical(replace(first, values=numbers, padding=None))
    shown = _canonical(first, recipe.preset_of(place))
    eight_bits = needs_eight_bits_only(shown.values)
    if recipe.spacing_mm:
        shown = resampled(shown, recipe.spacing_mm)
        classes = None if classes is None else resampled(classes, recipe.spacing_mm, labels=True)
    values = np.zeros((len(modalities), *shown.shape), np.float32)
    values[place] = shown.values
    for place, image in others:
        other = read_volume(image)
        _check_same_patient_space(other, first)
        unit = _canonical(other, recipe.preset_of(place))
        eight_bits = eight_bits and needs_eight_bits_only(unit.values)
        values[place] = _on_grid(unit, like(other, first), shown, recipe)
    return values, None if classes is None else _bytes(classes), eight_bits, aspect_of(*shown.spacing_mm[1:])


def unit_values(volume: Volume, preset: str) -> Unit:
    """The values of a volume by the preset's rule, as they are stored: (D, H, W) in [0, 1].

    Low values that are to be shown as white are turned, as in pictures; HU are not, which are quantities.

    Raises:
        UnreadableImage: it is of another modality than the preset's, or CT and not in HU.
    """
    check_preset(volume, preset)
    in_hu = preset_named(preset).intensity == "window"
    values = -volume.values if volume.lowest_is_white and not in_hu else volume.values
    return to_unit_range(values, preset, valid=None if volume.padding is None else ~volume.padding)


def _canonical(volume: Volume, preset: str) -> Volume:
    """Values in [0, 1], in canonical orientation.

    They are put there before they are resampled: what lies beyond the window (metal, the padding around a CT's
    circle) means nothing to the preset, and would bleed into its neighbours otherwise.
    """
    return canonical(replace(volume, values=unit_values(volume, preset), padding=None))


def check_preset(volume: Volume, preset: str) -> None:
    """Refuse a volume that a preset is not for.

    Raises:
        UnreadableImage: it is of another modality, or CT and not in HU.
    """
    wanted = "CT" if preset.startswith("ct-") else "PT" if preset == "pet" else volume.modality
    if volume.modality not in (wanted, ""):
        raise UnreadableImage(f"not a {'PET' if wanted == 'PT' else wanted}, which the preset is for")
    if preset_named(preset).intensity == "window" and volume.modality == "CT" and volume.units != "HU":
        raise UnreadableImage(NOT_HOUNSFIELD)


def _check_same_patient_space(other: Volume, first: Volume) -> None:
    """Positions in two systems cannot be compared (PS3.3 C.7.4.1); images of both have to be registered first."""
    if other.frame_of_reference and first.frame_of_reference and other.frame_of_reference != first.frame_of_reference:
        raise UnreadableImage("its modalities have different frames of reference; register them first")


def _on_grid(unit: Volume, same: bool, target: Volume, recipe: Recipe) -> Unit:
    """Values (D, H, W) of another modality on the first one's grid, interpolated once at most; 0 outside of it."""
    if same:
        values: Unit = resampled(unit, recipe.spacing_mm).values if recipe.spacing_mm else unit.values
        return values
    there = onto(unit, target)
    if there.padding is None:
        return there.values
    if there.padding.all():
        raise UnreadableImage("one of its modalities lies nowhere on the first one")
    return np.where(there.padding, np.float32(0), there.values)


def _bytes(classes: Volume) -> Classes:
    numbers: Classes = classes.values.astype(np.uint8)
    return numbers
