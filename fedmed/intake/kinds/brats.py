"""BraTS-style sets: a folder per patient, or visit, with one NIfTI per MR sequence and one of the tumour's regions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.found import NIFTI, Found, Unmatched, stem_of

SEQUENCES = {  # in the order of the manifest's cells; names of 2013 to 2021, and of 2023 on
    "flair": ("flair", "t2f"),
    "t1": ("t1", "t1n"),
    "t1c": ("t1c", "t1ce", "t1gd"),
    "t2": ("t2", "t2w"),
}
MASKS = ("seg", "label", "otmulticlass")
VISIT = re.compile(r"(BraTS-[A-Za-z]+-\d{5})-\d{3}")  # since 2023: a patient and one of her time points
LAST_WORD = re.compile(r"[a-z0-9]+$")


def brats(source: Path) -> Iterator[Found | Unmatched]:
    """The patients below a folder. A sequence that nobody has gets no place; one that a patient lacks, an empty one.

    Raises:
        DataError: there is no folder with a sequence.
    """
    patients = [
        found for place, _, names in sorted(os.walk(source, followlinks=True)) if (found := _known(place, names))
    ]
    used = [name for name in SEQUENCES if any(name in files for _, files in patients)]
    if not used:
        raise DataError(f"{source}: holds no folder with a NIfTI whose name ends in {', '.join(SEQUENCES)}")
    for folder, files in patients:
        visit = VISIT.fullmatch(folder.name)
        patient = visit[1] if visit else folder.name
        one = Found(patient=patient, images=tuple(files.get(name) for name in used), mask=files.get("mask"))
        if one.mask is None:
            yield Unmatched(what="image without mask", place=os.path.relpath(folder, source), found=one)
        elif len(files) == 1:
            yield Unmatched(what="mask without image", place=os.path.relpath(folder, source))
        else:
            yield one


def _known(place: str, names: list[str]) -> tuple[Path, dict[str, Path]] | None:
    """A folder and its files by what they are; None if it holds nothing of it."""
    folder, files = Path(place), {}
    for name in sorted(names):
        word = LAST_WORD.search(stem_of(name, NIFTI).lower())
        for what, spellings in ({**SEQUENCES, "mask": MASKS}).items():
            if word is not None and word.group() in spellings:
                files[what] = folder / name
    return (folder, files) if files else None
