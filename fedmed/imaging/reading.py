"""One image file as an array in [0, 1], whatever it is: DICOM by its content, else PNG or JPEG.

What a picture has to become depends on the work: a `Preset` says so. The table holds one line per preset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedmed.errors import ConfigError, UnreadableImage
from fedmed.imaging.dicom.colour import displayed_colours, luma
from fedmed.imaging.dicom.frames import frame_values, in_hounsfield, pixel_sides, transformation
from fedmed.imaging.dicom.grey import displayed_frames
from fedmed.imaging.dicom.kinds import check_kind
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.dicom.pixels import check_single, declared
from fedmed.imaging.plain_errors import plain_errors, plainly
from fedmed.imaging.raster import read_classes, read_raster
from fedmed.imaging.recipe import BETWEEN, IN_3D
from fedmed.imaging.resize import aspect_of

Pixels = NDArray[np.float32]

ROBUST_PERCENTILES = (0.5, 99.5)
SAMPLE = 2**21  # values from which percentiles are taken: 2 million move a percentile by less than 0.02 of itself
SAME_GREY = 2.5 / 255  # between channels of a grey picture that went through YBR and back
NOT_HOUNSFIELD = "CT values that are not in Hounsfield units"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a picture becomes."""

    channels: int
    intensity: Literal["display", "window", "robust"] = "display"
    window_hu: tuple[float, float] = (0.0, 0.0)  # centre and width, for "window"
    modalities: frozenset[str] = frozenset()  # DICOM kinds that are let in; empty = all that are images
    secondary_captures: bool = False
    colour: Literal["refuse", "grey", "luma", "keep"] = "refuse"  # what becomes of a DICOM object in colour


_CT = frozenset({"ct"})
PRESETS = {
    "cxr": Preset(channels=1, colour="grey"),  # projection radiographs: as displayed, polarity undone
    # some public sets hold radiographs as secondary captures, also grey ones in three channels
    "cxr-sc": Preset(channels=1, secondary_captures=True, colour="grey"),
    # Windows in HU are convention, as on a CT workstation, centre and width; those of the file are ignored
    "ct-lung": Preset(channels=1, intensity="window", window_hu=(-600, 1500), modalities=_CT),
    "ct-soft": Preset(channels=1, intensity="window", window_hu=(40, 400), modalities=_CT),
    "ct-brain": Preset(channels=1, intensity="window", window_hu=(40, 80), modalities=_CT),
    "ct-bone": Preset(channels=1, intensity="window", window_hu=(300, 1500), modalities=_CT),
    "mr": Preset(channels=1, intensity="robust"),  # arbitrary units: maxima from 112 to 1.7 million in one real set
    "pet": Preset(channels=1, intensity="robust"),  # activity, or SUV where the file holds it
    "us": Preset(channels=1, colour="luma"),  # grey ultrasound is often stored as RGB or YBR
    "color": Preset(channels=3, secondary_captures=True, colour="keep"),  # fundus, skin, endoscopy, many of them SC
}


def _rule(preset: str | Preset) -> Preset:
    return preset_named(preset) if isinstance(preset, str) else preset


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f'data.preset = "{name}" is unknown; there are {", ".join(PRESETS)}')
    return PRESETS[name]


def presets_named(names: str) -> tuple[Preset, ...]:
    """The preset of every modality, "ct-soft;pet", or the one of all of them.

    Raises:
        ConfigError: there is none of a name, or they give different numbers of channels.
    """
    found = tuple(map(preset_named, names.split(BETWEEN)))
    if len({preset.channels for preset in found}) > 1:
        raise ConfigError(f'data.preset = "{names}" gives its modalities different numbers of channels')
    return found


def require_channels(modalities: int, preset: str, items: str, in_channels: int) -> None:
    """Refuse images whose channels are not those of the network.

    Args:
        modalities: of a row of the manifest.
        preset: or one for each modality.
        items: what a row of a batch is; of volumes a preset gives one channel.
        in_channels: of the network.

    Raises:
        ConfigError: they do not fit, or the preset is unknown.
    """
    presets = presets_named(preset)
    channels = 1 if items in IN_3D else presets[0].channels
    if in_channels % channels:
        raise ConfigError(
            f'model.in-channels = {in_channels} does not fit data.preset = "{preset}", which gives {channels}'
        )
    if modalities > 1 and in_channels != modalities * channels:
        raise ConfigError(
            f"model.in-channels = {in_channels} does not fit the {modalities} modalities of a manifest's "
            f'rows, to each of which data.preset = "{preset}" gives {channels}'
        )
    if len(presets) not in (1, modalities):
        raise ConfigError(
            f'data.preset = "{preset}" names {len(presets)} modalities, and a row of a manifest {modalities}'
        )


def read_image(path: Path, *, preset: str = "cxr") -> Pixels:
    """Read one picture.

    Args:
        path: DICOM (known by its content), PNG or JPEG.
        preset: a key of `PRESETS`.

    Returns:
        (C, H, W) in [0, 1]; C = 3 for "color", else 1. Grey under "color" is one plane seen three times, read-only.

    Raises:
        UnreadableImage: for whatever reason it cannot be read. The message names neither file nor patient.
        ConfigError: the preset is unknown.
    """
    return next(_frames(Path(path), preset_named(preset), single=True))


def read_frames(path: Path, preset: str = "cxr") -> Iterator[Pixels]:
    """Read every frame of a file, one at a time: ultrasound loops, angiography, enhanced objects.

    With "mr" each frame has a range of its own; volumes take theirs together, see `to_unit_range`.

    Yields:
        As `read_image`.

    Raises:
        UnreadableImage: as `read_image`, on the first frame or later.
        ConfigError: the preset is unknown.
    """
    return _frames(Path(path), preset_named(preset), single=False)


def read_aspect(path: Path) -> float:
    """How many times as high as wide the pixels of a picture are; of PNG and JPEG they are square.

    Raises:
        UnreadableImage: its header cannot be read.
    """
    with plain_errors():
        return aspect_of(*pixel_sides(open_dicom(path))) if is_dicom(path) else 1.0


def read_mask(path: Path, *, labels: int = 0) -> NDArray[np.int64]:
    """Read a mask, (H, W) of class numbers, from a grey PNG, or with one label a JPEG; see `read_classes`.

    Args:
        path: of the mask.
        labels: of the task; 0 = unknown, numbers are as stored.

    Raises:
        UnreadableImage: it cannot be read, or holds no class numbers.
    """
    try:
        with plain_errors():
            return read_classes(path, labels=labels)
    except UnreadableImage as error:
        raise UnreadableImage(f"mask: {error}") from None


def to_unit_range(
    values: NDArray[np.float32], preset: str | Preset, *, valid: NDArray[np.bool_] | None = None
) -> Pixels:
    """Quantities in the units of their modality as [0, 1], by the preset's rule.

    Args:
        values: of any shape: a plane, or a whole volume, which so has one scale.
        preset: "ct-*" cut a fixed window in HU; "mr" stretches the 0.5th to 99.5th percentile of what is neither
            padding nor background; the others stretch the whole range.
        valid: of the same shape; False = padding, which becomes 0.

    Returns:
        A new array of the same shape.
    """
    return _to_unit_range_(np.array(values, np.float32), _rule(preset), valid)


def _to_unit_range_(values: Pixels, rule: Preset, valid: NDArray[np.bool_] | None) -> Pixels:
    """The same in the array that is given."""
    if rule.intensity == "window":
        centre, width = rule.window_hu
        low, high, background = centre - width / 2, centre + width / 2, None
    else:
        low, high, background = _range(values, valid, robust=rule.intensity == "robust")
    values -= np.float32(low)
    values /= np.float32(high - low if high > low else 1)
    np.clip(values, 0, 1, out=values)
    if background is not None:
        np.copyto(values, 0, where=background)
    if valid is not None:
        for row, known in zip(values, valid, strict=True):  # row by row, for the whole of ~valid is a quarter of values
            np.copyto(row, 0, where=~known)
    return values


def _range(
    values: Pixels, valid: NDArray[np.bool_] | None, *, robust: bool
) -> tuple[float, float, NDArray[np.bool_] | None]:
    """Low and high end, and what is background: of volumes cut free, the value in all corners, whatever it is."""
    background = None
    if robust and values.size:
        corners = values[np.ix_(*((0, -1) for _ in values.shape))]
        background = values == corners.flat[0] if (corners == corners.flat[0]).all() else None
    if robust:
        step = max(1, values.size // SAMPLE) | 1  # odd, so that it does not walk down a column
        few = _kept(*(None if each is None else each.reshape(-1)[::step] for each in (valid, background)))
        sample = values.reshape(-1)[::step][... if few is None else few]
        low, high = np.percentile(sample, ROBUST_PERCENTILES) if sample.size else (0, 0)
        if high > low:
            return float(low), float(high), background
    keep = _kept(valid, background)
    low = values.min(where=True if keep is None else keep, initial=np.inf)
    high = values.max(where=True if keep is None else keep, initial=-np.inf)
    return (float(low), float(high), background) if low <= high else (0.0, 0.0, background)


def _kept(valid: NDArray[np.bool_] | None, background: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """What is neither padding nor background; None = everything."""
    if background is None:
        return valid
    keep = ~background
    if valid is not None:
        keep &= valid
    return keep


def _frames(path: Path, rule: Preset, *, single: bool) -> Iterator[Pixels]:
    for pixels in plainly(_read(path, rule, single=single)):
        if not np.isfinite(pixels.sum(dtype=np.float64)):  # of values in [0, 1]: without an array of truth values
            raise UnreadableImage("pixels that are not numbers")
        yield pixels


def _read(path: Path, rule: Preset, *, single: bool) -> Iterator[Pixels]:
    if is_dicom(path):
        yield from _read_dicom(open_dicom(path), rule, single=single)
    else:
        yield read_raster(path, rule.channels)


def _read_dicom(ds: Dataset, rule: Preset, *, single: bool) -> Iterator[Pixels]:
    check_kind(ds, secondary_captures=rule.secondary_captures, modalities=rule.modalities)
    claims = declared(ds)
    if single:
        check_single(claims)
    if claims.photometric.startswith("MONOCHROME"):
        planes = displayed_frames(ds) if rule.intensity == "display" else _quantities(ds, rule)
        for plane in planes:
            yield np.broadcast_to(plane, (rule.channels, *plane.shape)) if rule.channels > 1 else plane[None]
    elif rule.colour == "refuse":
        raise UnreadableImage("colour image")
    else:
        for colours in displayed_colours(ds):
            if rule.colour == "grey" and np.ptp(colours, axis=0).max() > SAME_GREY:
                raise UnreadableImage("colour image")
            yield colours if rule.colour == "keep" else luma(colours)


def _quantities(ds: Dataset, rule: Preset) -> Iterator[Pixels]:
    """Frames by the preset's own range. HU are not inverted: what MONOCHROME1 says of them is for a screen."""
    for index, frame in enumerate(frame_values(ds)):
        if rule.intensity == "window":
            if not in_hounsfield(transformation(ds, index)):
                raise UnreadableImage(NOT_HOUNSFIELD)
        elif frame.lowest_is_white:
            np.negative(frame.values, out=frame.values)
        yield _to_unit_range_(frame.values, rule, ~frame.padding if frame.padding.any() else None)
