"""One phantom radiograph as a DICOM object with the attributes that its modality requires.

Nobody's name is in it. UIDs are made from the seed (PS3.5 B.2, root 2.25), so that the same seed gives the same file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

from fedmed.imaging.phantoms.scanner import LUT_BITS, LUT_ENTRIES, Scanner, first_mapped, lut, stored

IMPLEMENTATION = UID("2.25.316514389105204517034592071134860541183")
CHEST = ("51185008", "SCT", "Chest")  # CID 4031


class Uids(NamedTuple):
    """Of the objects of one exposure."""

    study: str
    series: str
    instance: str


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Someone who does not exist."""

    identifier: str
    name: str
    age: int  # years
    sex: str
    view: str
    origin: tuple[int, int, int]  # seed, hospital, index: what UIDs are made from

    @classmethod
    def random(cls, hospital: int, index: int, seed: int, rng: np.random.Generator) -> Patient:
        """A patient with an age, a sex and a view."""
        return cls(
            identifier=f"P-{hospital:02d}{index + 1:05d}",
            name=f"Phantom^{hospital:02d}{index + 1:05d}",
            age=int(rng.integers(20, 90)),
            sex="FM"[int(rng.integers(2))],
            view=("PA", "AP")[int(rng.random() < 0.2)],
            origin=(seed, hospital, index),
        )


def write_object(path: Path, picture: NDArray[np.float32], scanner: Scanner, patient: Patient, exposure: int) -> Uids:
    """Write one image. Each exposure is a study of its own.

    Args:
        path: the file.
        picture: (H, W) in [0, 1], as a correct reader is to show it.
        scanner: how it is stored.
        patient: whose it is.
        exposure: counts the patient's images from 0.
    """
    uids = Uids(*(_uid(*patient.origin, exposure, level) for level in Uids._fields))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.ImplementationClassUID = IMPLEMENTATION
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    _describe_study_(ds, scanner, patient, exposure, uids)
    if scanner.modality == "DX":
        _describe_detector_(ds, scanner)
    _describe_display_(ds, scanner)
    _put_pixels_(ds, scanner, stored(scanner, picture))
    ds.save_as(path, enforce_file_format=True, overwrite=True)
    return uids


def _describe_study_(ds: Dataset, scanner: Scanner, patient: Patient, exposure: int, uids: Uids) -> None:
    """Patient, study, series, equipment (C.7.1 to C.7.5)."""
    direct = scanner.modality == "DX"
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation if direct else ComputedRadiographyImageStorage
    ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = uids.instance, uids.study, uids.series
    ds.PatientID, ds.PatientName = patient.identifier, patient.name
    ds.PatientIdentityRemoved, ds.DeidentificationMethod = "YES", "a phantom, of nobody"
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "", patient.sex, f"{patient.age:03d}Y"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20200101"
    ds.StudyTime = ds.ContentTime = "120000"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "", str(exposure + 1), ""
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = scanner.modality, 1, 1
    ds.Manufacturer, ds.ManufacturerModelName = "fedmed phantom", scanner.model
    ds.BodyPartExamined, ds.ViewPosition, ds.PatientOrientation = "CHEST", patient.view, ["L", "F"]
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""] if direct else ["ORIGINAL", "PRIMARY"]
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    ds.ImagerPixelSpacing = [scanner.spacing_mm, scanner.spacing_mm]


def _describe_detector_(ds: Dataset, scanner: Scanner) -> None:
    """What Digital X-Ray adds (C.8.11.1 to C.8.11.5)."""
    anatomy = Dataset()
    anatomy.CodeValue, anatomy.CodingSchemeDesignator, anatomy.CodeMeaning = CHEST
    ds.AnatomicRegionSequence = [anatomy]
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.ImageLaterality, ds.DetectorType, ds.AcquisitionContextSequence = "U", "SCINTILLATOR", []
    ds.PixelIntensityRelationship = "LOG"
    ds.PixelIntensityRelationshipSign = 1 if scanner.inverted else -1
    ds.PresentationLUTShape = "INVERSE" if scanner.inverted else "IDENTITY"


def _describe_display_(ds: Dataset, scanner: Scanner) -> None:
    """Rescale, and window or VOI LUT (C.11.1, C.11.2)."""
    if scanner.modality == "DX" or (scanner.slope, scanner.intercept) != (1, 0):
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = scanner.slope, scanner.intercept, "US"
    if scanner.display == "LUT":
        item = Dataset()
        first = first_mapped(scanner)
        item.add_new("LUTDescriptor", "SS" if scanner.signed else "US", [LUT_ENTRIES, first, LUT_BITS])
        item.add_new("LUTData", "OW", lut().astype("<u2").tobytes())
        ds.VOILUTSequence = [item]
    elif scanner.display:
        ds.WindowCenter, ds.WindowWidth = scanner.centre, scanner.width
        if scanner.display != "LINEAR":
            ds.VOILUTFunction = scanner.display


def _put_pixels_(ds: Dataset, scanner: Scanner, cells: NDArray[Any]) -> None:
    """Image Pixel module (C.7.6.3), then the unit's transfer syntax."""
    ds.Rows, ds.Columns = cells.shape
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 16, scanner.bits, scanner.bits - 1
    ds.PixelRepresentation = int(scanner.signed)
    ds.PhotometricInterpretation = "MONOCHROME1" if scanner.inverted else "MONOCHROME2"
    if scanner.collimator:
        ds.PixelPaddingValue = scanner.padding
    ds.PixelData = cells.tobytes()
    if scanner.syntax.is_encapsulated:
        ds.compress(scanner.syntax, generate_instance_uid=False)
    elif scanner.syntax == DeflatedExplicitVRLittleEndian:
        ds.file_meta.TransferSyntaxUID = scanner.syntax


def _uid(*parts: int | str) -> str:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16])}"
