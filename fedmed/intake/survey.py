"""One image looked at for a data check: what its header says, its fingerprint, a thumbnail, and whether its mask fits.

This runs in the process that decodes (`fedmed.imaging.isolation`), so that a damaged file costs itself alone. Nothing
of a header but what is counted (maker, modality, photometric kind, transfer syntax, spacing) comes out of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import UID

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.kinds import check_kind
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.fingerprints import fingerprint, fingerprints
from fedmed.imaging.raster import raster
from fedmed.imaging.reading import read_frames, read_image, read_mask
from fedmed.imaging.volumes import read_mask_volume, read_volume
from fedmed.imaging.volumes.headers import ENHANCED
from fedmed.imaging.volumes.volume import Volume
from fedmed.intake.quarantine import quarantined

SIDE = 24  # of a thumbnail that is compared, pixels
PERCENTILES = (1.0, 99.0)
NAMES = (
    "PatientName",
    "PatientBirthDate",
    "OtherPatientIDs",
    "PatientAddress",
    "ReferringPhysicianName",
    "InstitutionName",
)
LONGEST = 64  # characters of a maker or model

Grey = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


def look(image: str, mask: str, side: int) -> Arrays:
    """Look at one image.

    Args:
        image: a picture, a DICOM object, the folder of a series, or a NIfTI.
        mask: of it; "" = none.
        side: of a thumbnail to be shown, pixels; 0 = none.

    Returns:
        `facts` (bytes of JSON), `fingerprint` (8 bytes, none for an image of one value), `thumbnail` (24, 24) uint8,
        and `picture` (side, side) uint8.

    Raises:
        UnreadableImage: it cannot be read.
    """
    path = Path(image)
    if path.is_dir() or is_dicom(path):
        facts, grey, prints, volume = _dicom(path)
    else:
        facts, grey, prints, volume = _picture_or_nifti(path)
    if mask:
        facts["mask"] = _mask(Path(mask), grey.shape, volume)
    digest = hashlib.sha256(prints.tobytes()).digest()[:8] if len(prints) else b""
    return {
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        "fingerprint": np.frombuffer(digest, np.uint8),
        "thumbnail": _small(grey, SIDE),
        "picture": _small(grey, side) if side else np.zeros((0, 0), np.uint8),
    }


JOBS = {"look": look}


def _picture_or_nifti(path: Path) -> tuple[dict[str, Any], Grey, NDArray[np.uint8], Volume | None]:
    try:
        pixels = raster(path, indices=False)
    except (OSError, SyntaxError) as error:  # Pillow's word for another format
        if not path.is_file():
            raise
        if path.name.lower().endswith((".png", ".jpg", ".jpeg")):
            raise error
        volume = read_volume(path)
        return _of_volume(volume, "NIfTI"), _middle(volume), fingerprints(path), volume
    grey = pixels.mean(axis=2, dtype=np.float32) if pixels.ndim == 3 else pixels.astype(np.float32)
    prints = np.frombuffer(fingerprint(pixels), np.uint8) if grey.min() != grey.max() else np.zeros(0, np.uint8)
    kind = {".png": "PNG"}.get(path.suffix.lower(), "JPEG")
    facts = {"format": kind, "photometric": "colour" if pixels.ndim == 3 else "grey", "size": list(grey.shape)}
    return facts, grey, prints, None


def _dicom(path: Path) -> tuple[dict[str, Any], Grey, NDArray[np.uint8], Volume | None]:
    first = (
        min((file for file in path.iterdir() if file.is_file() and is_dicom(file)), default=None)
        if path.is_dir()
        else path
    )
    if first is None:
        raise UnreadableImage("no DICOM file in its folder")
    ds = open_dicom(first)
    facts = _header(ds)
    if path.is_dir() or ds.get("SOPClassUID") in ENHANCED:
        volume = read_volume(path)
        return (
            facts | _of_volume(volume, "DICOM series" if path.is_dir() else "DICOM"),
            _middle(volume),
            fingerprints(path),
            volume,
        )
    kind = check_kind(ds, secondary_captures=True)
    frames = int(ds.get("NumberOfFrames") or 1)
    pixels = next(read_frames(path, "color")) if frames > 1 else read_image(path, preset="color")
    spacing = ds.get("PixelSpacing") or ds.get("ImagerPixelSpacing") or []
    facts |= {
        "format": "DICOM",
        "size": list(pixels.shape[1:]),
        "frames": frames,
        "capture": kind.modality == "capture",
        "spacing_mm": [float(each) for each in spacing],
    }
    return facts, pixels.mean(axis=0, dtype=np.float32), fingerprints(path), None


def _header(ds: Dataset) -> dict[str, Any]:
    """What is counted of a header, and whether it says whose the image is."""
    removed = str(ds.get("PatientIdentityRemoved") or "").upper() == "YES"
    ours = str(ds.get("DeidentificationMethod") or "").startswith("fedmed")  # looked at when it was kept
    syntax = str(getattr(ds, "file_meta", {}).get("TransferSyntaxUID") or "")
    return {
        "maker": _text(ds.get("Manufacturer")),
        "model": _text(ds.get("ManufacturerModelName")),
        "modality": _text(ds.get("Modality")),
        "photometric": _text(ds.get("PhotometricInterpretation")),
        "syntax": UID(syntax).name if syntax else "",
        "identified": not removed,
        "named": any(str(ds.get(name) or "").strip() for name in NAMES),
        "quarantine": "" if ours else quarantined(ds) or "",
    }


def _of_volume(volume: Volume, kind: str) -> dict[str, Any]:
    return {"format": kind, "size": list(volume.shape), "spacing_mm": [round(each, 4) for each in volume.spacing_mm]}


def _middle(volume: Volume) -> Grey:
    plane: Grey = volume.values[volume.shape[0] // 2].astype(np.float32)
    return plane


def _mask(path: Path, shape: tuple[int, ...], volume: Volume | None) -> str:
    """What is wrong with a mask, "" if nothing is."""
    try:
        classes = read_mask(path) if volume is None else read_mask_volume(path, volume)
    except UnreadableImage as error:
        return str(error)
    if volume is None and classes.shape != shape:
        return "another size than its image"
    return "" if classes.any() else "empty"


def _small(grey: Grey, side: int) -> NDArray[np.uint8]:
    """A square thumbnail, stretched from the 1st to the 99th percentile."""
    low, high = np.percentile(grey, PERCENTILES)
    scaled = np.clip((grey - low) * (255 / (high - low)), 0, 255) if high > low else np.zeros_like(grey)
    resized = Image.fromarray(scaled.astype(np.uint8)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(resized)


def _text(value: object) -> str:
    return " ".join(str(value or "").split())[:LONGEST]
