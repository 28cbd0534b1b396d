"""A folder of DICOM files as the one volume that it holds, or the reason why it is none.

Headers are read first, then the pixels of what was chosen. Files that are no slices (text, DICOMDIR, reports, screens,
localizers) are passed over and counted. A file that is damaged is not: without it the series would be another one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.headers import (
    CLASSIC,
    ENHANCED,
    classic_slice,
    enhanced_slices,
    is_derived,
    is_localizer,
    is_mosaic,
    kind_of,
)
from fedmed.imaging.volumes.pixels import decoded
from fedmed.imaging.volumes.slices import Group, Refusal, Slice, grouped, only_volume
from fedmed.imaging.volumes.volume import Volume

MAX_FILES = 20_000  # of a folder; a whole-body CT has 2,000
MOSAIC = Refusal(reason="mosaics, each of which shows many slices side by side", slices=1, blocks=True)
DAMAGED = Refusal(reason="a damaged DICOM file among the slices", slices=1, blocks=True)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the headers of a folder say."""

    groups: tuple[Group | Refusal, ...]
    passed_over: Counter[str]  # what was no slice -> how many


def read_series(folder: Path) -> Volume:
    """The one volume in a folder.

    Args:
        folder: files of one series, of any name and in any order; subfolders are not entered.

    Returns:
        Slices sorted along their normal, d rising with it, padding filled with the lowest value of the image.

    Raises:
        UnreadableImage: there is no volume, or more than one; with the reason, which names no file.
    """
    with plain_errors():
        survey = surveyed(folder)
        if not survey.groups:
            raise UnreadableImage(f"no slices{_listed(survey.passed_over)}")
        return decoded(only_volume(survey.groups))


def surveyed(folder: Path) -> Survey:
    """Read all headers of a folder and group them. No pixels are read.

    Raises:
        UnreadableImage: too many files.
        OSError: the folder cannot be listed.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if len(files) > MAX_FILES:
        raise UnreadableImage(f"more than {MAX_FILES} files")
    slices: list[Slice] = []
    refusals: list[Refusal] = []
    passed_over: Counter[str] = Counter()
    for file in files:
        match _slices_of(file):
            case str(what):
                passed_over[what] += 1
            case Refusal() as refusal:
                refusals.append(refusal)
            case list(found):
                slices += found
    return Survey(groups=(*grouped(slices), *_merged(refusals)), passed_over=passed_over)


def _slices_of(file: Path) -> list[Slice] | Refusal | str:
    """The slices in a file, why it makes the folder unusable, or what it is if it holds none."""
    if not is_dicom(file):
        return "not DICOM"
    try:
        with plain_errors():
            ds = open_dicom(file)
            return _enhanced(ds, file) if kind_of(ds) in ENHANCED else _classic(ds, file)
    except UnreadableImage:
        return DAMAGED if _may_be_slice(file) else "no slice"


def _classic(ds: Dataset, file: Path) -> list[Slice] | Refusal | str:
    kind = kind_of(ds)
    if not kind:
        return DAMAGED
    if kind not in CLASSIC:
        return "no slice"
    if is_localizer(ds.get("ImageType")):
        return "localizer"
    if is_mosaic(ds.get("ImageType")):
        return MOSAIC
    found = classic_slice(ds, file)
    if found is None:
        if is_derived(ds):
            return "derived picture without a place"
        return Refusal(reason="slices that do not say where they lie", slices=1, blocks=True)
    return [found]


def _enhanced(ds: Dataset, file: Path) -> list[Slice] | Refusal | str:
    try:
        return list(enhanced_slices(ds, file)) or "localizer"
    except UnreadableImage as error:
        return Refusal(reason=str(error), slices=1)


def _merged(refusals: list[Refusal]) -> list[Refusal]:
    """One refusal for each reason."""
    counts = Counter((refusal.reason, refusal.blocks) for refusal in refusals)
    return [Refusal(reason=reason, slices=count, blocks=blocks) for (reason, blocks), count in counts.items()]


def _listed(passed_over: Counter[str]) -> str:
    return f" ({', '.join(f'{count} × {what}' for what, count in sorted(passed_over.items()))})" if passed_over else ""


def _may_be_slice(file: Path) -> bool:
    """Whether file meta information of a damaged file names a slice, or nothing at all (PS3.10 7.1)."""
    try:
        with plain_errors():
            kind = str(pydicom.filereader.read_file_meta_info(file).get("MediaStorageSOPClassUID", ""))
    except UnreadableImage:
        return True
    return not kind or kind in (*CLASSIC, *ENHANCED)
