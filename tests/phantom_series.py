"""Phantom CT, MR and PET volumes as real DICOM: a series of single slices, or one enhanced multi-frame CT.

Like a scanner's export, files have names and instance numbers that say nothing about where slices lie. Nobody's name is
in them, and the same seed gives the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)

from fedmed.imaging.phantoms.dicom_object import IMPLEMENTATION
from fedmed.imaging.volumes.geometry import Plane, affine_of
from fedmed.imaging.volumes.volume import Affine

Vector = tuple[float, float, float]
KINDS = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
AIR_HU, TISSUE_HU, LESION_HU = -1000.0, 40.0, 160.0
RESCALE = {"CT": (1.0, -1024.0), "MR": (1.0, 0.0)}  # PET: another slope in each slice


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """How a phantom was scanned. Directions and positions are DICOM's (LPS, mm)."""

    modality: Literal["CT", "MR", "PT"] = "CT"
    shape: tuple[int, int, int] = (12, 24, 20)  # slices, rows, columns
    spacing_mm: Vector = (3.0, 1.5, 1.25)  # between slices, rows, columns
    along_row: Vector = (1.0, 0.0, 0.0)
    along_column: Vector = (0.0, 1.0, 0.0)
    origin_mm: Vector = (-12.0, -17.0, 40.0)
    thickness_mm: float = 5.0  # Slice Thickness, which is not the distance of slices
    seed: int = 0

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Where slices lie, along their normal."""
        return tuple(self._plane(self.spacing_mm[0] * index) for index in range(self.shape[0]))

    @property
    def affine(self) -> Affine:
        """(d, h, w, 1) to RAS mm."""
        first = self.planes[0]
        return affine_of(first, first.normal * self.spacing_mm[0])

    def _plane(self, distance_mm: float) -> Plane:
        normal = np.cross(self.along_row, self.along_column)
        x, y, z = (np.array(self.origin_mm) + normal * distance_mm).tolist()
        return Plane(
            position=(x, y, z),
            along_row=self.along_row,
            along_column=self.along_column,
            spacing_mm=(self.spacing_mm[1], self.spacing_mm[2]),
        )


def phantom_body(shape: tuple[int, int, int], seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An ellipsoid of soft tissue in air with one bright lesion; it looks different from every side.

    Args:
        shape: D, H, W.
        seed: where the lesion lies.

    Returns:
        (D, H, W) in HU, whole numbers; and the lesion, 0 or 1.
    """
    rng = np.random.default_rng(seed)
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    centre, radius = rng.uniform(0.15, 0.35, 3) * (1, -1, 1), 0.3
    body = (d / 0.95) ** 2 + (h / 0.75) ** 2 + (w / 0.9) ** 2 < 1
    lesion = (d - centre[0]) ** 2 + (h - centre[1]) ** 2 + (w - centre[2]) ** 2 < radius**2
    values = np.where(lesion, LESION_HU, np.where(body, TISSUE_HU + 20 * d + 10 * h + 5 * w, AIR_HU))
    noise = rng.normal(0, 4, shape) * (values > AIR_HU)
    return np.rint(values + noise).astype(np.float32), lesion.astype(np.uint8)


def write_series(folder: Path, values: NDArray[np.float32], acquisition: Acquisition) -> None:
    """Write a volume as one file per slice.

    Args:
        folder: is made.
        values: (D, H, W) in the units of the modality; CT and MR are rounded to whole numbers.
        acquisition: geometry and modality.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects = slice_objects(values, acquisition)
    names = np.random.default_rng([acquisition.seed, 1]).permutation(len(objects))
    for name, ds in zip(names.tolist(), objects, strict=True):
        ds.save_as(folder / f"I{name:04d}", enforce_file_format=True, overwrite=True)


def slice_objects(values: NDArray[np.float32], acquisition: Acquisition) -> list[Dataset]:
    """The slices of a volume as single-frame objects, in order of position."""
    numbers = np.random.default_rng([acquisition.seed, 2]).permutation(len(values)) + 1
    return [
        _slice(plane, picture, acquisition, index, int(number))
        for index, (plane, picture, number) in enumerate(zip(acquisition.planes, values, numbers, strict=True))
    ]


def enhanced_object(values: NDArray[np.float32], acquisition: Acquisition, order: Sequence[int] = ()) -> Dataset:
    """A volume as one Enhanced CT (PS3.3 A.38).

    Args:
        values: (D, H, W) in HU.
        acquisition: geometry.
        order: which slice each frame shows; () = as they lie.
    """
    ds = _common(acquisition, EnhancedCTImageStorage, "enhanced", 1)
    order = tuple(order) or tuple(range(len(values)))
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.NumberOfFrames = len(order)
    slope, intercept = RESCALE["CT"]
    ds.SharedFunctionalGroupsSequence = [
        _item(
            PixelMeasuresSequence=_item(
                PixelSpacing=list(acquisition.spacing_mm[1:]), SliceThickness=acquisition.thickness_mm
            ),
            PlaneOrientationSequence=_item(ImageOrientationPatient=[*acquisition.along_row, *acquisition.along_column]),
            PixelValueTransformationSequence=_item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU"),
            CTImageFrameTypeSequence=_item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]),
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        _item(
            PlanePositionSequence=_item(ImagePositionPatient=list(acquisition.planes[index].position)),
            FrameContentSequence=_item(
                DimensionIndexValues=[number + 1], StackID="1", InStackPositionNumber=number + 1
            ),
        )
        for number, index in enumerate(order)
    ]
    _put_pixels_(ds, np.rint((values[list(order)] - intercept) / slope).astype(np.int16))
    return ds


def _slice(plane: Plane, picture: NDArray[np.float32], acquisition: Acquisition, index: int, number: int) -> Dataset:
    """One single-frame object (PS3.3 A.3, A.4, A.21)."""
    modality = acquisition.modality
    ds = _common(acquisition, KINDS[modality], f"slice {index}", number)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] if modality != "MR" else ["ORIGINAL", "PRIMARY", "M", "NORM"]
    ds.ImagePositionPatient = [round(value, 6) for value in plane.position]
    ds.ImageOrientationPatient = [round(value, 9) for value in (*plane.along_row, *plane.along_column)]
    ds.PixelSpacing, ds.SliceThickness = list(plane.spacing_mm), acquisition.thickness_mm
    ds.AcquisitionNumber = 1
    slope, intercept = RESCALE.get(modality, (max(float(picture.max()), 1.0) / 32000, 0.0))
    if modality == "MR":
        ds.EchoTime, ds.RepetitionTime = 10.0, 500.0
    else:
        slope = float(f"{slope:.10g}")  # DS holds 16 characters
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        ds.RescaleType = "HU" if modality == "CT" else "US"
    signed = modality == "CT"
    _put_pixels_(ds, np.rint((picture - intercept) / slope).astype(np.int16 if signed else np.uint16))
    return ds


def _common(acquisition: Acquisition, kind: str, what: str, number: int) -> Dataset:
    """Patient, study, series, frame of reference, equipment (C.7.1 to C.7.5)."""
    seed = acquisition.seed
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.ImplementationClassUID = IMPLEMENTATION
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = kind, _uid(seed, what)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = _uid(seed, "study"), _uid(seed, "series")
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = _uid(seed, "frame of reference"), ""
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = f"P-{seed:07d}", f"Phantom^{seed}", "", "O"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20200101"
    ds.StudyTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "", "1", ""
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = acquisition.modality, 1, number
    ds.Manufacturer, ds.BodyPartExamined, ds.PatientPosition = "fedmed phantom", "ABDOMEN", "HFS"
    return ds


def _put_pixels_(ds: Dataset, cells: NDArray[Any]) -> None:
    """Image Pixel module (C.7.6.3)."""
    ds.Rows, ds.Columns = cells.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(cells.dtype.kind == "i")
    ds.PixelData = cells.tobytes()


def _item(**attributes: Any) -> Dataset:
    """A data set with these attributes; a data set among them becomes a sequence of one."""
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, [value] if isinstance(value, Dataset) else value)
    return ds


def _uid(seed: int, what: str) -> str:
    digest = hashlib.sha256(f"{seed}/{what}".encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16])}"
