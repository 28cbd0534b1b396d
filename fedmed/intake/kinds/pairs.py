"""Folders of images, with or without masks of the same names beside them, `images/` and `masks/`; also nnU-Net's."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from itertools import chain
from pathlib import Path

from fedmed.errors import DataError
from fedmed.imaging.volumes.nifti import several_volumes
from fedmed.intake.kinds.found import ENDINGS, NIFTI, Found, Unmatched, files_below, leftovers, stem_of

IMAGES = ("images", "imagesTr")
MASKS = ("masks", "labels", "labelsTr")
CHANNEL = re.compile(r"(.+)_(00\d\d)")  # nnU-Net: the image of a case and one of its modalities
SEVERAL = "NIfTI of several volumes; write each modality to a file of its own, CASE_0000.nii.gz, CASE_0001.nii.gz …"
AFFIXES = ("_mask", "-mask", "_seg", "_label")  # that mask's names have beyond their image's


def pairs(source: Path) -> Iterator[Found | Unmatched]:
    """Each image of `images/` with its mask of `masks/`; without that folder, each image alone.

    A mask has the name of its image, in the same subfolder; of `CASE_0000`, `CASE_0001` and on, which are modalities of
    one image then, the name `CASE`. Where several images or masks have one name, nobody can say which belong together,
    and none is taken. An image's patient is its name, with subfolders, until a table of labels says more (`patient_id`
    in labels.toml).

    Raises:
        DataError: there is no folder of images, or it holds none.
    """
    holder = _folder(source, MASKS)
    masks: dict[str, list[str]] = defaultdict(list)
    for name, path in files_below(holder, ENDINGS) if holder else ():
        masks[_bare(name)].append(path)
    files = [
        (name, path)
        for name, path in files_below(_folder(source, IMAGES) or source, ENDINGS)
        if not holder or not Path(path).is_relative_to(holder)
    ]
    if not files:
        raise DataError(f"{source}: holds no images of a kind that can be read ({', '.join(ENDINGS)})")
    cases = _cases(files, masks)
    places = 1 + max(place for images in cases.values() for place in images)
    for name, images in sorted(cases.items()):
        drawn = masks.pop(name, [])
        pictures = [picture for place in sorted(images) for picture in images[place]]
        if len(pictures) > len(images) or len(drawn) > 1:
            yield from leftovers(source, [*pictures, *drawn], "one of several images or masks of one name")
            continue
        one = Found(
            patient=name,
            images=tuple(Path(images[place][0]) if place in images else None for place in range(places)),
            mask=Path(drawn[0]) if drawn else None,
        )
        if any(stem_of(picture, NIFTI) and several_volumes(Path(picture)) for picture in pictures):
            yield Unmatched(what=SEVERAL, place=os.path.relpath(pictures[0], source), found=one)
        elif holder and not drawn:
            yield Unmatched(what="image without mask", place=os.path.relpath(pictures[0], source), found=one)
        else:
            yield one
    yield from leftovers(source, chain.from_iterable(masks.values()), "mask without image")


def _cases(files: Sequence[tuple[str, str]], masks: Container[str]) -> dict[str, dict[int, list[str]]]:
    """Name of a case -> place of a modality -> its files. Only masks tell modalities from cases that are numbered."""
    names = {name for name, _ in files}
    cases: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, path in files:
        channel = CHANNEL.fullmatch(name)
        if channel and channel[1] in masks and channel[1] not in names and name not in masks:
            cases[channel[1]][int(channel[2])].append(path)
        else:
            cases[name][0].append(path)
    return cases


def _folder(source: Path, names: tuple[str, ...]) -> Path | None:
    return next((source / name for name in names if (source / name).is_dir()), None)


def _bare(stem: str) -> str:
    return next((stem.removesuffix(affix) for affix in AFFIXES if stem.endswith(affix)), stem)
