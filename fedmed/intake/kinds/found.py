"""What every kind of archive gives: images with whose they are and what is known of them, or what fits nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pydicom

from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.plain_errors import plain_errors
from fedmed.intake.persons import sex_of, years

PICTURES = (".png", ".jpg", ".jpeg")
NIFTI = (".nii", ".nii.gz")
ENDINGS = (*PICTURES, *NIFTI, ".dcm", ".dicom")
UNCERTAIN = "-1"  # as CheXpert and MIMIC-CXR write it


@dataclass(frozen=True, kw_only=True)
class Found:
    """One image or volume."""

    patient: str
    images: tuple[Path | None, ...]  # one for most; several modalities in the set's order, None = this one is missing
    mask: Path | None = None
    masked: bool = False  # others of its archive have a mask
    classes: Mapping[int, int] = field(default_factory=dict)  # of the mask, old number to new: it is written anew
    study: str = ""
    series: str = ""
    accession: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)  # "0", "1", "" = unknown, "-1" = uncertain; in one order
    view: str = ""
    age: str = ""  # years
    sex: str = ""  # M, F or O
    split: str = ""
    site: str = ""
    pseudonymous: bool = False  # patient, study and accession are the site's pseudonyms already

    @property
    def image(self) -> Path:
        """The first modality that is there."""
        return next(image for image in self.images if image is not None)


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """An image without a row of labels, or a row without an image."""

    what: str  # "image without row", "row without image", "image without mask", "mask without image"
    place: str  # the image relative to its archive, or "row 17" of the table
    found: Found | None = None  # the image, if it is known and set apart: its row of the table is not without image


def the_file(source: Path, *patterns: str) -> Path:
    """The one file of an archive that such a name has, first pattern first.

    Raises:
        DataError: there is none.
    """
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            return path
    raise DataError(f"{source}: holds no {' or '.join(patterns)}, as this kind of data set does")


def files_by_stem(source: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Every file below a folder with such an ending: name without it -> path."""
    return {Path(name).name: path for name, path in files_below(source, endings)}


def files_below(source: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every file below a folder with such an ending: its path there without it, and its path. Links are followed."""
    for folder, names in folders_below(source):
        for name in names:
            if stem := stem_of(name, endings):
                path = folder / name
                yield str(path.with_name(stem).relative_to(source)), str(path)


def folders_below(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and every one below it, with the names of its files, sorted. Links are followed.

    What macOS packs beside files, `._NAME` and `__MACOSX`, and all else that is hidden, is passed over.
    """
    for folder, folders, names in os.walk(source, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__MACOSX" and not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def stem_of(name: str, endings: tuple[str, ...]) -> str:
    """A file's name without the longest of the endings that it has; "" if it has none."""
    fitting = [ending for ending in endings if name.lower().endswith(ending)]
    return name[: -len(max(fitting, key=len))] if fitting else ""


def leftovers(source: Path, paths: Iterable[str], what: str) -> Iterator[Unmatched]:
    """What stayed unmatched in an archive."""
    for path in sorted(paths):
        yield Unmatched(what=what, place=os.path.relpath(path, source))


def with_header(found: Found) -> Found:
    """The same image with view, age and sex from its DICOM header, if it is a DICOM file that can be read."""
    try:
        with plain_errors():
            tags = ["ViewPosition", "PatientAge", "PatientSex"]
            header = pydicom.dcmread(found.image, stop_before_pixels=True, specific_tags=list(tags), force=True)
            view, age, sex = (str(header.get(tag) or "").strip() for tag in tags)
    except UnreadableImage:
        return found
    return replace(found, view=view, age=years(age), sex=sex_of(sex))
