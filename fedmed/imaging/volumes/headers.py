"""Headers of DICOM files as slices: one per file of a classic series, one per frame of an enhanced object.

Instance numbers, file names and Dimension Index Values say in which order somebody meant to show the slices. None of
them is read; see `geometry`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import (
    BreastTomosynthesisImageStorage,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    XRay3DAngiographicImageStorage,
    XRay3DCraniofacialImageStorage,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.frames import functional_group
from fedmed.imaging.volumes.geometry import Plane, check_plane
from fedmed.imaging.volumes.slices import TELL_APART, Slice

CLASSIC = (CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage)  # a file is a slice
ENHANCED = (  # a frame is a slice, and says itself where it lies (PS3.3 C.7.6.16)
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    XRay3DAngiographicImageStorage,
    XRay3DCraniofacialImageStorage,
    BreastTomosynthesisImageStorage,
)
NO_SLICES = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SCREEN SAVE"}  # in Image Type (0008,0008) from its third value on
FRAME_FACTS = {  # where an enhanced object keeps what tells its frames apart: functional group, attribute
    "EchoTime": ("MREchoSequence", "EffectiveEchoTime"),
    "TemporalPositionIdentifier": ("FrameContentSequence", "TemporalPositionIndex"),
    "AcquisitionNumber": ("FrameContentSequence", "FrameAcquisitionNumber"),
    "DiffusionBValue": ("MRDiffusionSequence", "DiffusionBValue"),
    "TriggerTime": ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    "NominalPercentageOfCardiacPhase": ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase"),
    "InversionTime": ("MRModifierSequence", "InversionTimes"),
    "FlipAngle": ("MRTimingAndRelatedParametersSequence", "FlipAngle"),
    "ConvolutionKernel": ("CTReconstructionSequence", "ConvolutionKernel"),
    "KVP": ("CTXRayDetailsSequence", "KVP"),
    "StackID": ("FrameContentSequence", "StackID"),
    "AcquisitionTime": ("FrameContentSequence", "FrameAcquisitionDateTime"),
}
FRAME_TYPES = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")
CONVERTED = "UnassignedPerFrameConvertedAttributesSequence"  # legacy converted objects keep old attributes here


def kind_of(ds: Dataset) -> str:
    """The SOP class, from the object or from its file meta information; "" if neither says."""
    return str(ds.get("SOPClassUID") or getattr(ds, "file_meta", {}).get("MediaStorageSOPClassUID") or "")


def is_localizer(image_type: Any) -> bool:
    """Whether Image Type or Frame Type says that this is an overview or a screen and no slice (C.8.2.1.1.1)."""
    return bool(_further(image_type) & NO_SLICES)


def is_mosaic(image_type: Any) -> bool:
    """Whether Image Type says that slices were tiled into one picture, as Siemens does with fast MR."""
    return "MOSAIC" in _further(image_type)


def _further(image_type: Any) -> set[str]:
    """Values of Image Type (0008,0008) from the third on."""
    values = image_type if isinstance(image_type, MultiValue | list | tuple) else [image_type]
    return {str(value).upper() for value in values[2:]}


def is_derived(ds: Dataset) -> bool:
    """Whether pixels were computed from other images, by Image Type's first value (C.7.6.1.1.2)."""
    return str((ds.get("ImageType") or [""])[0]).upper() == "DERIVED"


def classic_slice(ds: Dataset, file: Path) -> Slice | None:
    """The slice of a single-frame object, None if the header does not say where it lies.

    Args:
        ds: its header.
        file: whose.
    """
    plane = _plane(ds.get("ImagePositionPatient"), ds.get("ImageOrientationPatient"), ds.get("PixelSpacing"))
    if plane is None or not ds.get("Rows") or not ds.get("Columns") or int(ds.get("NumberOfFrames") or 1) > 1:
        return None
    return Slice(
        file=file,
        frame=0,
        instance=str(ds.get("SOPInstanceUID") or ""),
        kind=_kind(ds),
        frame_of_reference=str(ds.get("FrameOfReferenceUID") or ""),
        shape=(int(ds.Rows), int(ds.Columns)),
        plane=plane,
        facts={name: _fact(ds.get(name)) for name in TELL_APART},
    )


def enhanced_slices(ds: Dataset, file: Path) -> Iterator[Slice]:
    """The slices of an enhanced or legacy converted multi-frame object, without its localizers.

    Args:
        ds: its whole header.
        file: whose.

    Raises:
        UnreadableImage: a frame does not say where it lies.
    """
    frames = int(ds.get("NumberOfFrames") or 1)
    if len(ds.get("PerFrameFunctionalGroupsSequence") or ()) != frames:
        raise UnreadableImage("multi-frame without a functional group for each frame")
    if not ds.get("Rows") or not ds.get("Columns"):
        raise UnreadableImage("no rows or columns")
    if is_localizer(ds.get("ImageType")):
        return
    for frame in range(frames):
        facts = _frame_facts(ds, frame)
        if is_localizer(facts["ImageType"]):
            continue
        plane = frame_plane(ds, frame)
        if plane is None:
            raise UnreadableImage("frames that do not say where they lie")
        yield Slice(
            file=file,
            frame=frame,
            instance=str(ds.get("SOPInstanceUID") or ""),
            kind=_kind(ds),
            frame_of_reference=str(ds.get("FrameOfReferenceUID") or ""),
            shape=(int(ds.Rows), int(ds.Columns)),
            plane=plane,
            facts=facts,
        )


def frame_plane(ds: Dataset, frame: int) -> Plane | None:
    """Where one frame lies (C.7.6.16.2.1, .3 and .4), None if its functional groups do not say."""
    position = functional_group(ds, frame, "PlanePositionSequence")
    orientation = functional_group(ds, frame, "PlaneOrientationSequence")
    measures = functional_group(ds, frame, "PixelMeasuresSequence")
    if position is None or orientation is None or measures is None:
        return None
    return _plane(
        position.get("ImagePositionPatient"), orientation.get("ImageOrientationPatient"), measures.get("PixelSpacing")
    )


def _plane(position: Any, orientation: Any, spacing: Any) -> Plane | None:
    try:
        x, y, z = map(float, position)
        a, b, c, d, e, f = map(float, orientation)
        between_rows, between_columns = map(float, spacing)
        plane = Plane(
            position=(x, y, z),
            along_row=(a, b, c),
            along_column=(d, e, f),
            spacing_mm=(between_rows, between_columns),
        )
        check_plane(plane)
    except (TypeError, ValueError, UnreadableImage):
        return None
    return plane


def _kind(ds: Dataset) -> tuple[str, ...]:
    return (kind_of(ds), str(ds.get("Modality") or ""), str(ds.get("SeriesInstanceUID") or ""))


def _frame_facts(ds: Dataset, frame: int) -> dict[str, Hashable]:
    """What may tell this frame from others at its place."""
    facts: dict[str, Hashable] = {}
    converted = functional_group(ds, frame, CONVERTED)
    for name in TELL_APART:
        sequence, keyword = FRAME_FACTS.get(name, ("", ""))
        group = functional_group(ds, frame, sequence) if sequence else None
        value = group.get(keyword) if group is not None else None
        if value is None and converted is not None:
            value = converted.get(name)
        facts[name] = _fact(value)
    diffusion = functional_group(ds, frame, "MRDiffusionSequence")
    for direction in (diffusion.get("DiffusionGradientDirectionSequence") or ())[:1] if diffusion is not None else ():
        facts["DiffusionGradientOrientation"] = _fact(direction.get("DiffusionGradientOrientation"))
    for sequence in FRAME_TYPES:
        group = functional_group(ds, frame, sequence)
        if group is not None:
            facts["ImageType"] = _fact(group.get("FrameType"))
    return facts


def _fact(value: Any) -> Hashable:
    """A header's value as something that can be compared."""
    if isinstance(value, MultiValue | list | tuple):
        return tuple(_fact(one) for one in value)
    if isinstance(value, int | float):
        return float(value)
    return None if value is None else str(value)
