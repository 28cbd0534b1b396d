"""Which objects a person must look at before a network may: those whose pixels may show who somebody is.

Rules on the header, then a look for burnt-in text in the pixels (`burned_in`). Whoever calls `quarantined` decodes the
pixels, so it belongs into a process of its own, as `judging` is.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pydicom.dataset import Dataset

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.frames import functional_group
from fedmed.imaging.dicom.kinds import kind_of
from fedmed.intake.burned_in import shows_text

THIN_MM = 3.0  # slices of a head this thin or thinner make a face that is recognised when the volume is rendered
HEAD_PARTS = {
    "HEAD", "HEADNECK", "BRAIN", "SKULL", "FACE", "ORBIT", "SINUS", "EAR", "JAW", "MANDIBLE", "MAXILLA", "NOSE", "EYE",
    "NEURO", "IAC", "PITUITARY", "TMJ", "WHOLEBODY", "WHOLE",
}  # fmt: skip  # of Body Part Examined (PS3.16 Annex L), and what scanners write instead
HEAD_WORDS = re.compile(
    r"\b(head|brain|skull|face|facial|neuro|cranial|cerebral|kopf|schädel|schaedel|gehirn|crâne|crane|tête|cerveau)",
    re.I,
)
HEAD_CODES = {"69536005", "12738006", "89546000", "T-D1100", "T-A0100", "T-11100", "774007", "T-D1000"}  # SCT, SRT
DESCRIPTIONS = ("StudyDescription", "SeriesDescription", "ProtocolName", "RequestedProcedureDescription")
SCREENS = {"SCREEN SAVE", "SCREENSHOT", "SCREEN CAPTURE", "SCREENSAVE", "CAPTURE"}


def quarantined(dataset: Dataset) -> str | None:
    """Why a person must look at an object first, in words that may leave the site; None if nothing speaks against it.

    Args:
        dataset: with its pixels, before its descriptions were removed.
    """
    return header_reason(dataset) or pixel_reason(dataset)


def header_reason(dataset: Dataset) -> str | None:
    """What its header says already.

    In order: no patient id, so that nobody could be excluded or kept apart; Burned In Annotation YES (PS3.3
    C.7.6.1.1.1); secondary captures and screens; ultrasound that does not say it is free of text; faces, see
    `_shows_a_face`.
    """
    if not str(dataset.get("PatientID") or "").strip():
        return "no patient id"
    burned = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    modality = kind_of(dataset).modality
    if burned == "YES":
        return "burned-in annotation, says its header"
    if modality == "capture":
        return "secondary capture"
    if {str(value).upper() for value in _values(dataset.get("ImageType"))} & SCREENS:
        return "screen save"
    if modality == "us" and burned != "NO":
        return "ultrasound that does not say it is free of text"
    if modality in ("ct", "mr") and _shows_a_face(dataset):
        return "recognisable face"
    return None


def pixel_reason(dataset: Dataset) -> str | None:
    """What its pixels show."""
    try:
        return shows_text(dataset)
    except UnreadableImage:
        return "pixels that cannot be looked at"


def _shows_a_face(dataset: Dataset) -> bool:
    """Recognizable Visual Features (0028,0302) if it says anything; else a head in slices of at most `THIN_MM`.

    A head is one by Body Part Examined, anatomic code or a word of its descriptions; slices of unknown thickness are
    taken as thin, and localizers are flat.
    """
    said = str(dataset.get("RecognizableVisualFeatures") or "").strip().upper()
    if said in ("YES", "NO"):
        return said == "YES"
    if {str(value).upper() for value in _values(dataset.get("ImageType"))} & {"LOCALIZER", "SCOUT"}:
        return False
    return _is_head(dataset) and _slice_mm(dataset) <= THIN_MM


def _is_head(dataset: Dataset) -> bool:
    parts = set(re.split(r"[^A-Z]+", str(dataset.get("BodyPartExamined") or "").upper()))
    anatomy = functional_group(dataset, 0, "FrameAnatomySequence")
    regions = [*(dataset.get("AnatomicRegionSequence") or ())]
    regions += anatomy.get("AnatomicRegionSequence") or () if anatomy is not None else ()
    codes = {str(region.get("CodeValue") or "") for region in regions}
    described = " ".join(str(dataset.get(name) or "") for name in DESCRIPTIONS).replace("_", " ")
    return bool(parts & HEAD_PARTS or codes & HEAD_CODES or HEAD_WORDS.search(described))


def _slice_mm(dataset: Dataset) -> float:
    """The smaller of thickness and distance of slices, 0 if it is not said."""
    measures = functional_group(dataset, 0, "PixelMeasuresSequence") or dataset
    said = [measures.get(name) for name in ("SliceThickness", "SpacingBetweenSlices")]
    sizes = [abs(float(size)) for size in said if size not in (None, "") and math.isfinite(float(size))]
    return min((size for size in sizes if size), default=0.0)


def _values(value: Any) -> list[object]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
