"""One image looked at for a data check: what its header says, its fingerprint, a thumbnail, and whether its mask fits.

This runs in the process that decodes (`fedmed.imaging.isolation`), so that a damaged file costs itself alone. Nothing
of a header but what is counted (maker, modality, photometric kind, transfer syntax, spacing) comes out of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import UID

from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.dicom.kinds import check_kind
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.fingerprints import fingerprints
from fedmed.imaging.items import checked, is_nifti
from fedmed.imaging.items_3d import check_preset
from fedmed.imaging.raster import raster
from fedmed.imaging.reading import read_frames, read_image, read_mask
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.volumes import read_mask_volume, read_volume
from fedmed.imaging.volumes.headers import ENHANCED
from fedmed.imaging.volumes.targets import OVERLAP
from fedmed.imaging.volumes.volume import Volume
from fedmed.intake.burned_in import text_in
from fedmed.intake.deidentify import is_ours
from fedmed.intake.quarantine import header_reason, pixel_reason

SIDE = 24  # of a thumbnail that is compared, pixels
NAMES = ("PatientBirthDate", "OtherPatientIDs", "ReferringPhysicianName", "InstitutionName")
DUMMY = re.compile(  # what stands in the place of a name or a birth date (PS3.15 E.1)
    r"(anon(ym(ous|i[sz]ed|e|isiert|isé)?)?|de-?identified|removed|unknown|none)[\W\d]*|19000101", re.I
)
EMPTY, OVERLAPPING = "empty", "regions overlap"  # of masks that need not be wrong
SHOWN = {"mr": "mr", "nuclear": "pet"}  # the preset of a modality; "color" takes all else
FAINT = 2**13  # highest value of a picture of 16 bits that uses less than an eighth of them, as 12 bits unscaled do
LONGEST = 64  # characters of a maker or model

Grey = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """An image as it was seen."""

    facts: dict[str, Any]
    grey: Grey  # (H, W): the picture, or the middle slice or first frame
    digest: bytes  # of its pixels, 8 bytes; none for an image of one value, which many patients could share
    volume: Volume | None = None


def look(image: str, mask: str, side: int, text: bool, regions: Sequence[str] = (), preset: str = "") -> Arrays:
    """Look at one image.

    Args:
        image: a picture, a DICOM object, the folder of a series, or a NIfTI.
        mask: of it; "" = none.
        side: of a thumbnail to be shown, pixels; 0 = none.
        text: whether burnt-in text is looked for, which takes longer than all the rest.
        regions: labels of a segmentation, which the mask is read with; () = not known.
        preset: that a run reads it with; "" = one that shows most of its modality.

    Returns:
        `facts` (bytes of JSON), `digest` (8 bytes or none), `thumbnail` (24, 24) uint8, `picture` (side, side) uint8.

    Raises:
        UnreadableImage: it cannot be read.
    """
    path = Path(image)
    seen = _dicom(path, preset, text=text) if path.is_dir() or is_dicom(path) else _other(path, text=text)
    if seen.volume is not None and preset:
        check_preset(seen.volume, preset)
    wrong = {"mask": _mask(Path(mask), seen, tuple(regions))} if mask else {}
    return {
        "facts": np.frombuffer(json.dumps(seen.facts | wrong).encode(), np.uint8),
        "digest": np.frombuffer(seen.digest, np.uint8),
        "thumbnail": _small(seen.grey, SIDE),
        "picture": _small(seen.grey, side) if side else np.zeros((0, 0), np.uint8),
    }


JOBS = {"look": look}


def _other(path: Path, *, text: bool) -> Looked:
    """A PNG or JPEG, decoded once, or a NIfTI."""
    try:
        pixels = raster(path)
    except OSError:  # Pillow's word for another format
        if not is_nifti(path):
            raise
        return _volume(path, {}, "NIfTI")
    grey = pixels.mean(axis=2, dtype=np.float32) if pixels.ndim == 3 else pixels.astype(np.float32)
    several = pixels.min() != pixels.max()
    facts = {
        "format": "PNG" if path.suffix.lower() == ".png" else "JPEG",
        "photometric": "colour" if pixels.ndim == 3 else "grey",
        "size": list(grey.shape),
        "quarantine": (text and text_in(grey)) or "",
        "searched": text,
        "faint": pixels.dtype == np.uint16 and bool(0 < pixels.max() < FAINT),
    }
    content = f"{pixels.shape} {pixels.dtype} ".encode() + pixels.tobytes()
    return Looked(facts=facts, grey=grey, digest=hashlib.sha256(content).digest()[:8] if several else b"")


def _dicom(path: Path, preset: str, *, text: bool) -> Looked:
    """A DICOM file, or the folder of a series, whose first file by name speaks for its header."""
    files = [path] if not path.is_dir() else [file for file in path.iterdir() if file.is_file() and is_dicom(file)]
    if not files:
        raise UnreadableImage("no DICOM file in its folder")
    ds = open_dicom(min(files))
    facts = _header(ds, text=text)
    if path.is_dir() or ds.get("SOPClassUID") in ENHANCED:
        return _volume(path, facts, "DICOM series" if path.is_dir() else "DICOM")
    kind, frames = check_kind(ds, secondary_captures=True), int(ds.get("NumberOfFrames") or 1)
    preset = preset or SHOWN.get(kind.modality, "color")
    pixels = next(read_frames(path, preset)) if frames > 1 else read_image(path, preset=preset)
    facts |= {
        "format": "DICOM",
        "size": list(pixels.shape[1:]),
        "frames": frames,
        "capture": kind.modality == "capture",
        "spacing_mm": [float(each) for each in ds.get("PixelSpacing") or ds.get("ImagerPixelSpacing") or ()],
    }
    return Looked(facts=facts, grey=pixels.mean(axis=0, dtype=np.float32), digest=_digest(path))


def _volume(path: Path, facts: dict[str, Any], kind: str) -> Looked:
    volume = read_volume(path)
    facts |= {"format": kind, "size": list(volume.shape), "spacing_mm": [round(each, 4) for each in volume.spacing_mm]}
    middle = volume.values[volume.shape[0] // 2].astype(np.float32)
    return Looked(facts=facts, grey=middle, digest=_digest(path), volume=volume)


def _digest(path: Path) -> bytes:
    """Of all frames or slices: of their fingerprints, in their own order."""
    found = fingerprints(path)
    return hashlib.sha256(found.tobytes()).digest()[:8] if len(found) else b""


def _header(ds: Dataset, *, text: bool) -> dict[str, Any]:
    """What is counted of a header, whether it says whose the image is, and what a person should look at."""
    ours = is_ours(ds)  # and looked at when it was kept
    marked = str(ds.get("PatientIdentityRemoved") or "").upper() == "YES"
    syntax = str(getattr(ds, "file_meta", {}).get("TransferSyntaxUID") or "")
    return {
        "maker": _text(ds.get("Manufacturer")),
        "model": _text(ds.get("ManufacturerModelName")),
        "modality": _text(ds.get("Modality")),
        "photometric": _text(ds.get("PhotometricInterpretation")),
        "syntax": _text(UID(syntax).name),
        "marked": marked,
        "named": any(map(_said, map(ds.get, NAMES))) if marked else _is_named(ds),
        "quarantine": "" if ours else header_reason(ds) or (text and pixel_reason(ds)) or "",
        "searched": ours or text,
    }


def _is_named(ds: Dataset) -> bool:
    """Whether an unmarked object names anybody: with more than dummies, or the patient's id again as public sets do."""
    said = {_said(ds.get("PatientName"))} - {_said(ds.get("PatientID"))}
    said |= {_said(ds.get(name)) for name in NAMES}
    return any(text and not DUMMY.fullmatch(text) for text in said)


def _said(value: object) -> str:
    return str(value or "").strip()


def _mask(path: Path, seen: Looked, regions: tuple[str, ...]) -> str:
    """What is wrong with a mask, "" if nothing is."""
    recipe = Recipe(preset="", labels=max(1, len(regions)))  # of one label, whatever is not 0 is it
    try:
        if seen.volume is None:
            numbers = read_mask(path, labels=len(regions))
            if numbers.shape != seen.grey.shape:
                return "another size than its image"
            classes = checked(numbers[None], numbers.shape, recipe, unit="pixels")
        else:
            numbers = read_mask_volume(path, seen.volume, regions or None)
            classes = checked(numbers, seen.volume.shape, recipe, unit="voxels")
    except (UnreadableImage, DataError) as error:
        return OVERLAPPING if str(error) == OVERLAP and not regions else str(error)
    return "" if classes.any() else EMPTY


def _small(grey: Grey, side: int) -> NDArray[np.uint8]:
    """A square thumbnail that uses all greys."""
    small = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BOX))
    low, high = float(small.min()), float(small.max())
    return ((small - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)


def _text(value: object) -> str:
    return " ".join(str(value or "").split())[:LONGEST]
