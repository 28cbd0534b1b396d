"""One row of a manifest as the arrays that are kept of it: decoded, resized and quantised.

This runs in the process that decodes (see `isolation`), so that only small arrays travel from there; hence it imports
no torch. A row gives n items: one picture, all slices or frames, or one volume. Its modalities are channels one after
the other; one that is missing is zeros.

How many bits are kept depends on what was decoded, and is decided before anything is resized:

* uint8, if every decoded value is a multiple of 1/255: pictures of 8 bits that no window has stretched. Resizing makes
  values between the levels; rounding them back errs by half of one grey level of the picture at most.
* uint16 otherwise: half of 1/65535 at most, which is half a grey level of a 16-bit picture and a sixteenth of half a
  level of a 12-bit one. All presets give [0, 1], where float16 would be coarser in the bright half (2⁻¹²) and take as
  many bytes, so it is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UnfitRow, UnreadableImage
from fedmed.imaging.reading import read_aspect, read_image, read_mask
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.resize import letterbox, letterbox_mask

Unit = NDArray[np.float32]  # values in [0, 1]
Classes = NDArray[np.uint8]  # class numbers, 0 = background
Arrays = dict[str, NDArray[Any]]
Modalities = Sequence[Path | None]  # in the order of the channels; None = missing, and never all of them
OFF_GRID = 1e-3  # of a grey level of 8 bits: above float32's rounding of k/255, and below half a level of 16 bits


def item(*, image: str | Sequence[str], mask: str, recipe: Mapping[str, Any]) -> Arrays:
    """The arrays that are kept of one row.

    Args:
        image: a picture, a series folder, a NIfTI or a multi-frame object; of several modalities one each, "" for one
            that is missing.
        mask: of the same geometry; "" = none.
        recipe: `Recipe.settings()`.

    Returns:
        "images": (n, C, S, S) or (1, C, D, H, W), uint8 or uint16, 1.0 being the highest number, C the channels of all
        modalities together; with a mask "masks": class numbers, uint8, of the same shape with C = 1.

    Raises:
        UnreadableImage: this row cannot be read.
        UnfitRow: the mask does not fit its image or the task.
    """
    steps = Recipe.from_settings(recipe)
    modalities = tuple(Path(name) if name else None for name in ((image,) if isinstance(image, str) else image))
    if not any(modalities):
        raise UnreadableImage("none of its modalities is there")
    files = (modalities, Path(mask) if mask else None)
    if steps.items == "images":
        return picture(*files, steps)
    from fedmed.imaging.items_3d import slices, volume  # heavy: nibabel and scipy

    return slices(*files, steps) if steps.items == "slices" else volume(*files, steps)


def quantised(values: Unit, *, eight_bits: bool) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Values in [0, 1] as whole numbers, rounded to the nearest."""
    scaled = np.clip(values, 0, 1)
    scaled *= np.float32(255 if eight_bits else 65535)
    np.rint(scaled, out=scaled)
    return scaled.astype(np.uint8) if eight_bits else scaled.astype(np.uint16)


def needs_eight_bits_only(values: Unit) -> bool:
    """Whether every value is a multiple of 1/255."""

    def on_grid(part: Unit) -> bool:
        levels = part * np.float32(255)
        return bool((np.abs(levels - np.rint(levels)) < OFF_GRID).all())

    flat = values.reshape(-1)
    return on_grid(flat[:: max(1, flat.size // 4096)]) and on_grid(flat)  # a few of them settle it nearly always


def picture(modalities: Modalities, mask: Path | None, recipe: Recipe) -> Arrays:
    """One picture, (1, C, S, S)."""
    presets = [recipe.preset_of(place) for place in range(len(modalities))]
    read = [
        None if image is None else _pixels(image, preset) for image, preset in zip(modalities, presets, strict=True)
    ]
    sizes = {found.shape for found in read if found is not None}
    if len(sizes) > 1:
        shown = " and ".join(sorted(_size(size) for size in sizes))
        raise UnreadableImage(f"its modalities differ in channels, height or width: {shown}")
    pixels = np.concatenate([np.zeros(next(iter(sizes)), np.float32) if found is None else found for found in read])
    classes = None
    if mask is not None:
        classes = checked(read_mask(mask, labels=recipe.labels)[None], pixels.shape[1:], recipe, unit="pixels")
    return squares(pixels[None], classes, recipe, read_aspect(next(image for image in modalities if image is not None)))


def _pixels(image: Path, preset: str) -> Unit:
    if image.is_dir() or is_nifti(image):
        raise UnreadableImage('a volume; data.items = "slices", "volumes" or "patches" would read it')
    return read_image(image, preset=preset)


def is_nifti(path: Path) -> bool:
    """Whether the name says NIfTI."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def squares(pixels: Unit, classes: Classes | None, recipe: Recipe, aspect: float) -> Arrays:
    """Pictures (1, C, H, W) and classes (1, H, W), whose pixels have that aspect, in a square."""
    small = letterbox(pixels[0], recipe.image_size, aspect)[None]
    arrays: Arrays = {"images": quantised(small, eight_bits=needs_eight_bits_only(pixels))}
    if classes is not None:
        arrays["masks"] = letterbox_mask(classes, recipe.image_size, aspect)[None]
    return arrays


def checked(numbers: NDArray[Any], shape: tuple[int, ...], recipe: Recipe, *, unit: str) -> Classes:
    """A mask as classes, if it has its image's shape and no class that the task lacks."""
    found = numbers.shape[1:] if unit == "pixels" else numbers.shape
    if found != tuple(shape):
        text = f"the mask is {_size(found)} {unit}, its image {_size(shape)} {unit}"
        raise UnfitRow.told(text)
    if recipe.labels == 1:
        numbers = numbers != 0
    highest = int(numbers.max(initial=0))
    if highest > recipe.labels or numbers.min(initial=0) < 0:
        text = f"the mask holds {highest}, but the task has {recipe.labels} labels"
        raise UnfitRow.told(text)
    classes: Classes = numbers.astype(np.uint8)
    return classes


def _size(shape: tuple[int, ...]) -> str:
    return " by ".join(map(str, shape))
