"""BraTS-style sets: a folder per patient, or visit, with one NIfTI per MR sequence and one of the tumour's regions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.volumes.nifti import read_nifti
from fedmed.intake.kinds.found import NIFTI, Found, Unmatched, folders_below, stem_of

SEQUENCES = {  # in the order of the manifest's cells; names of 2013 to 2021, and of 2023 on
    "flair": ("flair", "t2f"),
    "t1": ("t1", "t1n"),
    "t1c": ("t1c", "t1ce", "t1gd"),
    "t2": ("t2", "t2w"),
}
MASKS = ("seg", "segm", "label", "otmulticlass")
VISIT = re.compile(r"(BraTS-[A-Za-z]+-\d{5})-\d{3}")  # since 2023: a patient and one of her time points
ENHANCING = {4: 3}  # 2018 to 2021 call enhancing tumour 4 and have no 3; since 2023 it is 3
LAST_WORD = re.compile(r"[a-z0-9]+$")


def brats(source: Path) -> Iterator[Found | Unmatched]:
    """The patients below a folder. Each of the four sequences has its place in every row, empty where it is missing.

    Raises:
        DataError: there is no folder with a sequence.
    """
    patients = [found for folder, names in sorted(folders_below(source)) if (found := _known(folder, names))]
    if not any(files.keys() & SEQUENCES.keys() for _, files in patients):
        raise DataError(f"{source}: holds no folder with a NIfTI whose name ends in {', '.join(SEQUENCES)}")
    masks = {folder: files["mask"] for folder, files in patients if "mask" in files and len(files) > 1}
    old = _with_four(mask for folder, mask in masks.items() if not VISIT.fullmatch(folder.name))
    for folder, files in patients:
        visit = VISIT.fullmatch(folder.name)
        patient = visit[1] if visit else folder.name
        one = Found(
            patient=patient,
            images=tuple(files.get(name) for name in SEQUENCES),
            mask=files.get("mask"),
            classes=ENHANCING if files.get("mask") in old else {},
        )
        if one.mask is None:
            yield Unmatched(what="image without mask", place=os.path.relpath(folder, source), found=one)
        elif len(files) == 1:
            yield Unmatched(what="mask without image", place=os.path.relpath(folder, source))
        else:
            yield one


def _with_four(masks: Iterable[Path]) -> frozenset[Path]:
    """The masks that hold 4; none if one of the archive holds 3, for then 4 is a class of its own, as until 2016."""
    found = set()
    for mask in masks:
        try:
            values = read_nifti(mask, labels=True).values
        except (UnreadableImage, OSError):
            continue  # which the check will say
        if (values == 3).any():
            return frozenset()
        if (values == 4).any():
            found.add(mask)
    return frozenset(found)


def _known(folder: Path, names: list[str]) -> tuple[Path, dict[str, Path]] | None:
    """A folder and its files by what they are; None if it holds nothing of it."""
    files: dict[str, Path] = {}
    for name in names:
        word = LAST_WORD.search(stem_of(name, NIFTI).lower())
        for what, spellings in ({**SEQUENCES, "mask": MASKS}).items():
            if word is not None and word.group() in spellings:
                files[what] = folder / name
    return (folder, files) if files else None
