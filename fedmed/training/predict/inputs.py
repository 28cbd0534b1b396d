"""Which images somebody means who names files and folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import UnreadableImage
from fedmed.imaging.decoding import VOLUME_BYTES, VOLUME_TIMEOUT_S
from fedmed.imaging.dicom.opening import is_dicom
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.items import is_nifti
from fedmed.imaging.recipe import Items
from fedmed.training.predict.originals import FRAMES, IMAGE, SLICE

PICTURES = (".png", ".jpg", ".jpeg")
DIRECTORY = "DICOMDIR"  # lists the files of a medium (PS3.10 8.6)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Images in the order in which they were named; those of a folder in the order of their names."""

    images: tuple[Path, ...]  # files, and folders of one DICOM series each
    passed_over: int  # files in the folders that are no images


def decoder(items: Items) -> DecodingProcess:
    """A process that reads images, whose crash costs one of them."""
    jobs = "fedmed.training.predict.originals"
    if items == "images":
        return DecodingProcess(jobs=jobs)
    return DecodingProcess(timeout_s=VOLUME_TIMEOUT_S, memory_bytes=VOLUME_BYTES, jobs=jobs)


def find_images(named: Sequence[Path], items: Items, process: DecodingProcess) -> Found:
    """The images that files and folders stand for.

    A file is an image, whatever it is. Folders are searched with all folders in them, but not through links. For a
    network of pictures every file there is one that is DICOM by its content, or a .png, .jpg, .jpeg or .dcm; for one
    of volumes or slices the CT, MR or PET slices that lie in one folder are one image, other DICOM files with pixels
    one each, and so are .nii, .nii.gz and, for slices, pictures. Files whose names begin with a dot are passed over.

    Args:
        named: need not exist; what does not is found out when it is read.
        items: what the network is shown.
        process: in which headers are read.
    """
    images: list[Path] = []
    passed_over = 0
    for path in named:
        if not path.is_dir():
            images.append(path)
            continue
        for folder, files in _folders(path):
            found = _pictures(files) if items == "images" else _volumes(folder, files, items, process)
            images += found.images
            passed_over += found.passed_over
    return Found(images=tuple(images), passed_over=passed_over)


def _folders(top: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder from `top` on, and the files that lie directly in it, both in order."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), [Path(folder, name) for name in sorted(files) if not name.startswith(".")]


def _pictures(files: Sequence[Path]) -> Found:
    images = tuple(file for file in files if file.suffix.lower() in (*PICTURES, ".dcm") or _is_dicom(file))
    return Found(images=images, passed_over=len(files) - len(images))


def _volumes(folder: Path, files: Sequence[Path], items: Items, process: DecodingProcess) -> Found:
    """A series in this folder first, then what else is there."""
    dicom = [file for file in files if _is_dicom(file)]
    kinds = dict(zip(dicom, _kinds(dicom, process), strict=True))
    series = SLICE in kinds.values()
    alone = {FRAMES} if series else {FRAMES, IMAGE}  # beside a series, a single picture is its localizer or a screen
    own = [file for file in files if kinds.get(file) in alone or is_nifti(file) or _is_slice(file, items)]
    used = len(own) + (sum(kind in (SLICE, IMAGE) for kind in kinds.values()) if series else 0)
    return Found(images=(*([folder] if series else []), *own), passed_over=len(files) - used)


def _kinds(files: Sequence[Path], process: DecodingProcess) -> list[int]:
    if not files:
        return []
    try:
        return [int(kind) for kind in process.run("kinds", files=[str(file.absolute()) for file in files])["kinds"]]
    except UnreadableImage:  # one of them crashed the reader: each by itself will say so
        return [IMAGE] * len(files)


def _is_slice(file: Path, items: Items) -> bool:
    return items == "slices" and file.suffix.lower() in PICTURES


def _is_dicom(file: Path) -> bool:
    try:
        return file.name.upper() != DIRECTORY and file.is_file() and is_dicom(file)
    except (OSError, UnreadableImage):
        return False
