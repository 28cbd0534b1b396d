"""Images as they were given, beside what the network is shown of them. The jobs here run in the decoding process.

Like `fedmed.imaging.decode_child`, this imports nothing heavy at its top, and no torch at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmed.imaging.decode_child import item

Arrays = dict[str, Any]
SLICE, IMAGE, FRAMES, NO_PIXELS = range(4)  # what a DICOM file is: see `kinds`


def original(image: str | list[str], recipe: dict[str, Any]) -> Arrays:
    """An image in full size and in its own geometry, as grey or colour values of 8 bits to be looked at.

    Args:
        image: as for `item`; of several modalities the first that is there is shown.
        recipe: `Recipe.settings()`.

    Returns:
        Of pictures and frames "planes" (n, C, H, W) and "aspect" (), how many times as high as wide a pixel is. Of
        volumes "values" (D, H, W) as stored, its "affine" (4, 4), and of the grid that the network is shown "grid"
        (4, 4) and "grid_shape" (3,); see `Volume` for affines.
    """
    import numpy as np  # heavy, as are the others

    from fedmed.imaging.items_3d import is_volume, unit_values
    from fedmed.imaging.reading import read_aspect, read_frames, read_image
    from fedmed.imaging.recipe import Recipe
    from fedmed.imaging.volumes import read_volume
    from fedmed.imaging.volumes.resample import recentred, resampled
    from fedmed.imaging.volumes.volume import canonical

    steps = Recipe.from_settings(recipe)
    files = [image] if isinstance(image, str) else image
    place = next(place for place, file in enumerate(files) if file)
    path, preset = Path(files[place]), steps.preset_of(place)
    if steps.items == "images":
        return {"planes": _bytes(read_image(path, preset=preset)[None]), "aspect": np.array(read_aspect(path))}
    if steps.items == "slices" and not is_volume(path):
        planes = np.stack([_bytes(frame) for frame in read_frames(path, preset)])
        return {"planes": planes, "aspect": np.array(read_aspect(path))}
    volume = read_volume(path)
    values = _bytes(unit_values(volume, preset))
    grid = canonical(replace(volume, values=values, padding=None))
    if steps.spacing_mm:
        grid = resampled(grid, steps.spacing_mm, labels=True)
    if steps.volume_size:
        grid = recentred(grid, steps.volume_size, fill=0)
    return {"values": values, "affine": volume.affine, "grid": grid.affine, "grid_shape": np.array(grid.shape)}


def kinds(files: list[str]) -> Arrays:
    """What each DICOM file of a folder is, by its header.

    Returns:
        "kinds" (n,): SLICE, one of a series of CT, MR or PET; FRAMES, several in one file; IMAGE, any other, and what
        cannot be read, so that reading it says why; NO_PIXELS, reports, segmentations, structure sets and the like.
    """
    import numpy as np  # heavy

    return {"kinds": np.array([_kind(Path(file)) for file in files], np.uint8)}


JOBS: dict[str, Callable[..., Arrays]] = {"item": item, "original": original, "kinds": kinds}


def _kind(file: Path) -> int:
    from fedmed.errors import UnreadableImage
    from fedmed.imaging.dicom.opening import open_dicom  # heavy
    from fedmed.imaging.plain_errors import plain_errors
    from fedmed.imaging.volumes.headers import CLASSIC, kind_of
    from fedmed.imaging.volumes.segmentation_objects import SEGMENTATIONS

    try:
        with plain_errors():
            ds = open_dicom(file)
            if kind_of(ds) in SEGMENTATIONS or not ds.get("Rows"):
                return NO_PIXELS
            if int(ds.get("NumberOfFrames") or 1) > 1:
                return FRAMES
            return SLICE if kind_of(ds) in CLASSIC else IMAGE
    except UnreadableImage:
        return IMAGE


def _bytes(values: Any) -> Any:
    """Values in [0, 1] as 0 to 255."""
    import numpy as np

    return np.rint(np.clip(values, 0, 1) * np.float32(255)).astype(np.uint8)
