"""Which kinds of DICOM object hold pictures that a network may be trained on (SOP classes, DICOM PS3.4 B.5).

What is not in the table is refused: a new or private kind may look like an image and be a dose, a mask or a screen
with a name burnt into it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydicom import uid
from pydicom.dataset import Dataset

from fedmed.errors import UnreadableImage


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of object."""

    modality: str  # "xray", "ct", "mr", "us", "nuclear", "light", "capture"; "" = never an image to train on
    refusal: str = ""  # why it is left out, if it is


XRAY, CT, MR, US = Kind(modality="xray"), Kind(modality="ct"), Kind(modality="mr"), Kind(modality="us")
NUCLEAR, LIGHT = Kind(modality="nuclear"), Kind(modality="light")
RAW = Kind(modality="", refusal="raw detector data, for processing")
CAPTURE = Kind(modality="capture", refusal="secondary capture, not an acquired image")
DERIVED = Kind(modality="", refusal="a map of derived values, not an image")

KINDS: dict[str, Kind] = {
    uid.ComputedRadiographyImageStorage: XRAY,
    uid.DigitalXRayImageStorageForPresentation: XRAY,
    uid.DigitalXRayImageStorageForProcessing: RAW,  # needs -log and the vendor's processing
    uid.DigitalMammographyXRayImageStorageForPresentation: XRAY,
    uid.DigitalMammographyXRayImageStorageForProcessing: RAW,
    uid.DigitalIntraOralXRayImageStorageForPresentation: XRAY,
    uid.DigitalIntraOralXRayImageStorageForProcessing: RAW,
    uid.XRayAngiographicImageStorage: XRAY,
    uid.EnhancedXAImageStorage: XRAY,
    uid.XRayRadiofluoroscopicImageStorage: XRAY,
    uid.EnhancedXRFImageStorage: XRAY,
    uid.BreastTomosynthesisImageStorage: XRAY,
    uid.BreastProjectionXRayImageStorageForPresentation: XRAY,
    uid.BreastProjectionXRayImageStorageForProcessing: RAW,
    uid.XRay3DAngiographicImageStorage: XRAY,
    uid.XRay3DCraniofacialImageStorage: XRAY,
    uid.RTImageStorage: Kind(modality="", refusal="a radiotherapy object, not a diagnostic image"),
    uid.CTImageStorage: CT,
    uid.EnhancedCTImageStorage: CT,
    uid.LegacyConvertedEnhancedCTImageStorage: CT,
    uid.MRImageStorage: MR,
    uid.EnhancedMRImageStorage: MR,
    uid.EnhancedMRColorImageStorage: MR,
    uid.LegacyConvertedEnhancedMRImageStorage: MR,
    uid.MRSpectroscopyStorage: Kind(modality="", refusal="spectra, not an image"),
    uid.PositronEmissionTomographyImageStorage: NUCLEAR,
    uid.EnhancedPETImageStorage: NUCLEAR,
    uid.LegacyConvertedEnhancedPETImageStorage: NUCLEAR,
    uid.NuclearMedicineImageStorage: NUCLEAR,
    "1.2.840.10008.5.1.4.1.1.5": NUCLEAR,  # retired
    uid.UltrasoundImageStorage: US,
    uid.UltrasoundMultiFrameImageStorage: US,
    "1.2.840.10008.5.1.4.1.1.3": US,  # retired, multi-frame
    "1.2.840.10008.5.1.4.1.1.6": US,  # retired
    uid.EnhancedUSVolumeStorage: US,
    uid.PhotoacousticImageStorage: US,
    uid.IntravascularOpticalCoherenceTomographyImageStorageForPresentation: LIGHT,
    uid.IntravascularOpticalCoherenceTomographyImageStorageForProcessing: RAW,
    uid.VLEndoscopicImageStorage: LIGHT,
    uid.VLMicroscopicImageStorage: LIGHT,
    uid.VLSlideCoordinatesMicroscopicImageStorage: LIGHT,
    uid.VLWholeSlideMicroscopyImageStorage: LIGHT,
    uid.VLPhotographicImageStorage: LIGHT,
    uid.OphthalmicPhotography8BitImageStorage: LIGHT,
    uid.OphthalmicPhotography16BitImageStorage: LIGHT,
    uid.OphthalmicTomographyImageStorage: LIGHT,
    uid.WideFieldOphthalmicPhotographyStereographicProjectionImageStorage: LIGHT,
    uid.WideFieldOphthalmicPhotography3DCoordinatesImageStorage: LIGHT,
    uid.OphthalmicOpticalCoherenceTomographyEnFaceImageStorage: LIGHT,
    uid.DermoscopicPhotographyImageStorage: LIGHT,
    uid.ConfocalMicroscopyImageStorage: LIGHT,
    uid.ConfocalMicroscopyTiledPyramidalImageStorage: LIGHT,
    uid.SecondaryCaptureImageStorage: CAPTURE,
    uid.MultiFrameSingleBitSecondaryCaptureImageStorage: CAPTURE,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage: CAPTURE,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage: CAPTURE,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage: CAPTURE,
    uid.SegmentationStorage: Kind(modality="", refusal="a segmentation, not an image"),
    uid.ParametricMapStorage: DERIVED,
    uid.OphthalmicThicknessMapStorage: DERIVED,
    uid.CornealTopographyMapStorage: DERIVED,
    uid.MediaStorageDirectoryStorage: Kind(modality="", refusal="a directory of files, not an image"),
}
FAMILIES: tuple[tuple[str, str], ...] = (  # beginnings of SOP class UIDs, for refusals that say what it is
    ("1.2.840.10008.5.1.4.1.1.9.", "a waveform, not an image"),
    ("1.2.840.10008.5.1.4.1.1.11.", "a presentation state, not an image"),
    ("1.2.840.10008.5.1.4.1.1.66", "raw or registration data, not an image"),
    ("1.2.840.10008.5.1.4.1.1.77.", "video or measurements, not an image"),
    ("1.2.840.10008.5.1.4.1.1.88.", "a report, not an image"),
    ("1.2.840.10008.5.1.4.1.1.104.", "an encapsulated document, not an image"),
    ("1.2.840.10008.5.1.4.1.1.481.", "a radiotherapy object, not a diagnostic image"),
    ("1.2.840.10008.5.1.4.39.", "a colour palette, not an image"),
    ("1.2.840.10008.", "a kind of object that is no image to train on"),
)


def kind_of(ds: Dataset) -> Kind:
    """What an object is, by its SOP Class UID (0008,0016), else by that of its file meta information."""
    name = str(ds.get("SOPClassUID") or getattr(ds, "file_meta", {}).get("MediaStorageSOPClassUID") or "")
    if not name:
        return Kind(modality="", refusal="header lacks SOPClassUID")
    if name in KINDS:
        return KINDS[name]
    families = (refusal for beginning, refusal in FAMILIES if name.startswith(beginning))
    return Kind(modality="", refusal=next(families, "a private kind of object"))


def check_kind(ds: Dataset, *, secondary_captures: bool = False, modalities: frozenset[str] = frozenset()) -> Kind:
    """Refuse objects that are no images to train on.

    Args:
        ds: the object; its pixels need not be loaded.
        secondary_captures: whether pictures of unknown origin, perhaps of a whole screen, are let in.
        modalities: those that are wanted; empty = any.

    Raises:
        UnreadableImage: with the reason.
    """
    kind = kind_of(ds)
    if kind.refusal and not (kind.modality == "capture" and secondary_captures):
        raise UnreadableImage(kind.refusal)
    if modalities and kind.modality not in modalities:
        raise UnreadableImage(f"not an image of modality {' or '.join(sorted(modalities))}".replace("ct", "CT"))
    return kind
