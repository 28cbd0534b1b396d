"""Folders of images, with or without masks of the same names beside them: `images/` and `masks/`, or as in the MSD."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.found import ENDINGS, Found, Unmatched, files_below, leftovers

IMAGES = ("images", "imagesTr")
MASKS = ("masks", "labels", "labelsTr")
AFFIXES = ("_mask", "-mask", "_seg", "_label")  # that mask's names have beyond their image's


def pairs(source: Path) -> Iterator[Found | Unmatched]:
    """Each image of `images/` with its mask of `masks/`; without that folder, each image alone.

    A mask has the name of its image, in the same subfolder. Where several images or masks have one name, nobody can say
    which belong together, and none is taken. An image's patient is its name, with subfolders, until a table of labels
    says more (`patient_id` in labels.toml).

    Raises:
        DataError: there is no folder of images, or it holds none.
    """
    holder = _folder(source, MASKS)
    images, masks = defaultdict(list), defaultdict(list)
    for name, path in files_below(_folder(source, IMAGES) or source, ENDINGS):
        if not holder or not Path(path).is_relative_to(holder):
            images[name].append(path)
    for name, path in files_below(holder, ENDINGS) if holder else ():
        masks[_bare(name)].append(path)
    if not images:
        raise DataError(f"{source}: holds no images of a kind that can be read ({', '.join(ENDINGS)})")
    for name, pictures in sorted(images.items()):
        drawn = masks.pop(name, [])
        if len(pictures) > 1 or len(drawn) > 1:
            yield from leftovers(source, [*pictures, *drawn], "one of several images or masks of one name")
        elif holder and not drawn:
            alone = Found(patient=name, images=(Path(pictures[0]),))
            yield Unmatched(what="image without mask", place=os.path.relpath(pictures[0], source), found=alone)
        else:
            yield Found(patient=name, images=(Path(pictures[0]),), mask=Path(drawn[0]) if drawn else None)
    yield from leftovers(source, chain.from_iterable(masks.values()), "mask without image")


def _folder(source: Path, names: tuple[str, ...]) -> Path | None:
    return next((source / name for name in names if (source / name).is_dir()), None)


def _bare(stem: str) -> str:
    return next((stem.removesuffix(affix) for affix in AFFIXES if stem.endswith(affix)), stem)
