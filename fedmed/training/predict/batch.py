"""Images one after the other: what the network says of each, and what is drawn of it. What fails says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmed.errors import ConfigError, FedmedError
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.manifest import images_of
from fedmed.imaging.recipe import BETWEEN
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.models import gate_maps
from fedmed.training.heat_maps import grad_cam, relative
from fedmed.training.predict.dense import Maps, image_logits, image_maps
from fedmed.training.predict.geometry import Frames, Original, Stack, original_of
from fedmed.training.predict.kept import Kept
from fedmed.training.predict.pictures import heat_overlay, region_overlay, write_mask, write_png

GATES = ("gate-1", "gate-2", "gate-3")  # of Attention U-Net, coarsest first


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture that was written."""

    what: str  # a label, a gate, "overlay", or "mask"
    file: str  # its name in the folder of the results
    slice: int | None = None  # which one it shows, from 1; None where there is one only


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one image."""

    number: int  # place among the images, from 1
    image: str  # as it was named
    probabilities: Mapping[str, float] = field(default_factory=dict)  # of a classifier, by label
    voxels: Mapping[str, int] = field(default_factory=dict)  # of a segmentation: pixels or voxels of each label
    voxel_ml: float | None = None  # of one voxel, where a volume says
    drawn: tuple[Drawn, ...] = ()
    error: str = ""


def check_heat_maps(kept: Kept, labels: Sequence[str]) -> None:
    """Refuse heat maps that the network cannot give, before any image is read.

    Raises:
        ConfigError: it knows no such label, or has no heat maps.
    """
    if kept.segments and not kept.has_gates:
        raise ConfigError("heat maps are of classifiers, and of attention-unet; this network draws masks as it is")
    if kept.segments and labels:
        raise ConfigError("the gates of attention-unet are of no label; leave --label out")
    for label in labels:
        if label not in kept.labels:
            raise ConfigError(f'the network knows no label "{label}"; there are {", ".join(kept.labels)}')


def predict_images(
    kept: Kept,
    images: Sequence[Path],
    folder: Path,
    process: DecodingProcess,
    *,
    heat_maps: bool = False,
    labels: Sequence[str] = (),
) -> Iterator[Prediction]:
    """What the network says of every image, in order, as soon as it is known.

    Args:
        kept: the network.
        images: files, or folders of a series each; of several modalities one each, with ";" between them.
        folder: where pictures and masks are written, as image-0001-… by the images' order.
        process: in which images are read, as `inputs.decoder` makes it.
        heat_maps: whether to draw where a classifier looked, or the gates of an Attention U-Net.
        labels: whose heat maps; none = that of each image's most probable label.

    Yields:
        A prediction; of an image that cannot be read or that the network cannot take, one with the error.

    Raises:
        OSError: a result cannot be written.
    """
    one = partial(_segmented if kept.segments else _classified, kept, heat_maps=heat_maps, labels=labels)
    width = max(4, len(str(len(images))))
    for number, path in enumerate(images, start=1):
        blank = Prediction(number=number, image=_text(path))
        place = folder / f"image-{number:0{width}d}"
        try:
            job: dict[str, Any] = {"image": _files(path, kept), "recipe": kept.recipe.settings()}
            yield one(blank, partial(process.run, **job), place)
        except FedmedError as error:
            yield replace(blank, error=str(error))


def _files(path: Path, kept: Kept) -> list[str]:
    """The modalities of an image, named as in a cell of a manifest.

    Raises:
        ConfigError: they are more or fewer than the network reads.
    """
    one = BETWEEN not in str(path) or path.exists()
    images = (path.absolute(),) if one else images_of(str(path), Path.cwd())
    if len(images) not in kept.modalities:
        named = "1 modality" if len(images) == 1 else f"{len(images)} modalities"
        wanted = max(kept.modalities)
        example = BETWEEN.join("abcdefgh"[:wanted])
        how = f'; name them as in a manifest, "{example}", and leave the place of a missing one empty'
        raise ConfigError(f"{named}, but the network reads {wanted}{how if wanted > 1 else ''}")
    return ["" if image is None else str(image) for image in images]


Decode = Callable[..., dict[str, NDArray[Any]]]


def _classified(
    kept: Kept, blank: Prediction, decode: Decode, place: Path, *, heat_maps: bool, labels: Sequence[str]
) -> Prediction:
    """Probabilities; of slices and patches their mean, since each was trained with the label of the whole."""
    images = decode("item", mask="")["images"]
    logits = torch.from_numpy(image_logits(kept, images)).double()  # (n, labels)
    values = torch.sigmoid(logits).mean(dim=0).tolist()
    probabilities = dict(zip(kept.labels, values, strict=True))
    drawn: tuple[Drawn, ...] = ()
    if heat_maps:
        chosen = labels or [max(probabilities, key=lambda label: probabilities[label])]
        numbers = [kept.labels.index(label) for label in chosen]
        maps = image_maps(kept, images, lambda tensors: grad_cam(kept.network.module, tensors, numbers))
        original = _original(kept, decode)
        drawn = tuple(
            _heat(original.back(relative(each)), original, label, place, f"heat-map-{label}")
            for label, each in zip(chosen, maps, strict=True)
        )
    return replace(blank, probabilities=probabilities, drawn=drawn)


def _segmented(
    kept: Kept, blank: Prediction, decode: Decode, place: Path, *, heat_maps: bool, labels: Sequence[str]
) -> Prediction:
    """A mask of class numbers, of the likeliest label where one is likelier than none, and what it looks like."""
    images = decode("item", mask="")["images"]
    logits = image_maps(kept, images, kept.network)
    original = _original(kept, decode)
    classes = classes_of(likelihoods(logits), original)
    at = _most(original.shown(classes))
    drawn = [*_masks(classes, original, place), _overlay(classes, original, at, place)]
    if heat_maps:
        gates = image_maps(
            kept, images, lambda tensors: torch.cat(gate_maps(kept.network.module, tensors), dim=1).clamp(0, 1)
        )
        drawn += [
            _heat(original.back(each), original, gate, place, gate, at=at)
            for gate, each in zip(GATES, gates, strict=True)
        ]
    return replace(
        blank,
        voxels={label: int((classes == number).sum()) for number, label in enumerate(kept.labels, start=1)},
        voxel_ml=float(np.prod(original.volume.spacing_mm)) / 1000 if isinstance(original, Stack) else None,
        drawn=tuple(drawn),
    )


def likelihoods(logits: Maps) -> Iterator[Maps]:
    """Probabilities of labels that exclude each other, label by label: a softmax over them and the background's 0.

    So two labels of which a sigmoid makes 1 each still differ.

    Args:
        logits: (labels, …).
    """
    together = np.zeros_like(logits[0])  # log Σ exp
    for each in logits:
        np.logaddexp(together, each, out=together)
    return (np.exp(each - together) for each in logits)


def classes_of(probabilities: Iterator[Maps], original: Original) -> NDArray[np.uint8]:
    """Class numbers in the image's own geometry.

    Probabilities are interpolated, and decided upon afterwards, so that borders do not follow the coarser grid.

    Args:
        probabilities: label by label, each (n, S, S) or (D, H, W) as the network was shown the image; the background
            has what they leave of 1.
        original: the image.

    Returns:
        (n, H, W) or (D, H, W), 0 = no label is likelier than the background.
    """
    classes = np.zeros(0, np.uint8)
    best = rest = np.zeros(0, np.float32)
    for number, each in enumerate(probabilities, start=1):
        there = original.back(each)
        if number == 1:
            classes, best, rest = np.zeros(there.shape, np.uint8), np.zeros_like(there), np.ones_like(there)
        classes[there > best] = number
        np.maximum(best, there, out=best)
        rest -= there
    classes[best <= rest] = 0
    return classes


def _original(kept: Kept, decode: Decode) -> Original:
    return original_of(decode("original"), squares=kept.recipe.items == "slices")


def _heat(maps: Maps, original: Original, what: str, place: Path, name: str, *, at: int | None = None) -> Drawn:
    """Draw heat (n, H, W) in [0, 1], on the slice or frame `at`, or else where it is highest."""
    heat = original.shown(maps)
    at = int(heat.reshape(len(heat), -1).max(axis=1).argmax()) if at is None else at
    picture = heat_overlay(original.grey[at], heat[at], original.pixel_mm)
    return _written(picture, what, place, name, at, len(heat))


def _overlay(classes: NDArray[np.uint8], original: Original, at: int, place: Path) -> Drawn:
    """Draw the mask on the slice or frame `at`."""
    regions = original.shown(classes)
    picture = region_overlay(original.grey[at], regions[at], original.pixel_mm)
    return _written(picture, "overlay", place, "overlay", at, len(regions))


def _most(regions: NDArray[np.uint8]) -> int:
    """The slice or frame with the most of the mask; without any, the middle one."""
    areas = (regions > 0).reshape(len(regions), -1).sum(axis=1)
    return int(areas.argmax()) if areas.any() else len(regions) // 2


def _written(picture: NDArray[np.uint8], what: str, place: Path, name: str, at: int, count: int) -> Drawn:
    shown = f"-slice-{at + 1:03d}" if count > 1 else ""
    path = place.with_name(f"{place.name}-{name}{shown}.png")
    write_png(picture, path)
    return Drawn(what=what, file=path.name, slice=at + 1 if count > 1 else None)


def _masks(classes: NDArray[np.uint8], original: Original, place: Path) -> Iterator[Drawn]:
    """Write a NIfTI with the volume's own affine, or a PNG for every frame."""
    if isinstance(original, Stack):
        path = place.with_name(f"{place.name}-mask.nii.gz")
        write_nifti(replace(original.volume, values=classes), path)
        yield Drawn(what="mask", file=path.name)
        return
    assert isinstance(original, Frames)
    for index, frame in enumerate(classes, start=1):
        shown = f"-slice-{index:03d}" if len(classes) > 1 else ""
        path = place.with_name(f"{place.name}-mask{shown}.png")
        write_mask(frame, path)
        yield Drawn(what="mask", file=path.name, slice=index if len(classes) > 1 else None)


def _text(path: Path) -> str:
    """A path as text that any program can read: what is no UTF-8 is shown as a question mark."""
    return str(path).encode("utf-8", "replace").decode()
