"""Folders of images, with or without masks of the same names beside them: `images/` and `masks/`, or as in the MSD."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.found import ENDINGS, Found, Unmatched, files_by_stem, leftovers

IMAGES = ("images", "imagesTr")
MASKS = ("masks", "labels", "labelsTr")
AFFIXES = ("_mask", "-mask", "_seg", "_label")  # that mask's names have beyond their image's


def pairs(source: Path) -> Iterator[Found | Unmatched]:
    """Each image of `images/` with its mask of `masks/`; without that folder, each image alone.

    An image's patient is its name until a table of labels says more (`patient_id` in labels.toml).

    Raises:
        DataError: there is no folder of images, or it holds none.
    """
    images = files_by_stem(_folder(source, IMAGES) or source, ENDINGS)
    holder = _folder(source, MASKS)
    masks = {_bare(stem): path for stem, path in files_by_stem(holder, ENDINGS).items()} if holder else {}
    if not images:
        raise DataError(f"{source}: holds no images of a kind that can be read ({', '.join(ENDINGS)})")
    for stem, image in sorted(images.items()):
        mask = masks.pop(stem, None)
        if holder and mask is None:
            yield from leftovers(source, {stem: image}, "image without mask")
        else:
            yield Found(patient=stem, images=(Path(image),), mask=Path(mask) if mask else None)
    yield from leftovers(source, masks, "mask without image")


def _folder(source: Path, names: tuple[str, ...]) -> Path | None:
    return next((source / name for name in names if (source / name).is_dir()), None)


def _bare(stem: str) -> str:
    return next((stem.removesuffix(affix) for affix in AFFIXES if stem.endswith(affix)), stem)
