"""Which objects a person must look at before a network may: those whose pixels may show who somebody is.

Rules on the header, then a look for burnt-in text in the pixels (`burned_in`). Whoever calls `quarantined` decodes the
pixels, so it belongs in a process of its own, as `judging` is.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    VLPhotographicImageStorage,
    XRay3DAngiographicImageStorage,
    XRay3DCraniofacialImageStorage,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.frames import functional_group
from fedmed.imaging.dicom.kinds import kind_of
from fedmed.imaging.volumes.headers import is_localizer
from fedmed.intake.burned_in import shows_text

THIN_MM = 3.0  # slices of a head this thin or thinner make a face that is recognised when the volume is rendered
HEAD_PARTS = {
    "HEAD", "HEADNECK", "BRAIN", "SKULL", "FACE", "ORBIT", "SINUS", "EAR", "JAW", "MANDIBLE", "MAXILLA", "NOSE", "EYE",
    "NEURO", "IAC", "PITUITARY", "TMJ", "WHOLEBODY", "WHOLE", "NECK", "NECKCHEST", "NECKCHESTABDOMEN",
    "NECKCHESTABDPELV", "CAROTID", "CSPINE",
}  # fmt: skip  # of Body Part Examined (PS3.16 Annex L), and what scanners write instead; a neck has the lower face
HEAD_WORDS = re.compile(
    r"\b(head|brain|skull|face|facial|neuro|cranial|cerebral|kopf|schädel|schaedel|gehirn|crâne|crane|tête|cerveau|"
    r"neck|carotid|carotis|c[ -]?spine|hals|hws\b)",
    re.I,
)
LONE_WORDS = re.compile(  # of an object without Body Part Examined: other parts have sinuses and orbits, too
    r"(?<![^\W\d])("  # they stand alone: a CCT is a head, a CCTA is a heart
    r"sinus|sinuses|sinuum|paranasal|nnh|nasennebenhöhlen?|orbits?|orbital|orbitae?|eyes?|augen?|pituitary|hypophyse|"
    r"hypophysis|sella|iacs?|cpa|felsenbein|felsenbeine|petrous|rochers?|mastoids?|temporal bones?|innenohr|inner ear|"
    r"tmj|kiefer|kiefergelenke?|mandible|mandibula|maxilla|maxillofacial|mittelgesicht|dental|jaws?|nose|nasal|"
    r"cct|cmrt|encephalon|encéphale|encephale|cerebrum|trigeminus|trigeminal|dentascan"
    r")(?![^\W\d])",
    re.I,
)
HEAD_CODES = {  # SCT, SRT
    "69536005", "12738006", "89546000", "T-D1100", "T-A0100", "T-11100", "774007", "T-D1000", "45048000", "T-D1600",
    "69105007", "T-45100", "122494005", "T-11501",
}  # fmt: skip
DESCRIPTIONS = ("StudyDescription", "SeriesDescription", "ProtocolName", "RequestedProcedureDescription")
IN_SPACE = (XRay3DAngiographicImageStorage, XRay3DCraniofacialImageStorage)  # X-ray volumes, as a CT is one
CAPTURE, SCREEN = "secondary capture", "screen save"  # no slices, whatever series they stand in
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
    C.7.6.1.1.1); secondary captures and screens; ultrasound that does not say it is free of text; faces: what
    Recognizable Visual Features (0028,0302) says, else any photograph, and volumes of heads, see `_is_a_face`.
    """
    if not str(dataset.get("PatientID") or "").strip():
        return "no patient id"
    burned = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    modality = kind_of(dataset).modality
    if burned == "YES":
        return "burned-in annotation, says its header"
    if modality == "capture":
        return CAPTURE
    if {str(value).upper() for value in _values(dataset.get("ImageType"))} & SCREENS:
        return SCREEN
    if modality == "us" and burned != "NO":
        return "ultrasound that does not say it is free of text"
    return _face(dataset, modality)


def pixel_reason(dataset: Dataset) -> str | None:
    """What its pixels show."""
    try:
        return shows_text(dataset)
    except UnreadableImage:
        return "pixels that cannot be looked at"


def _face(dataset: Dataset, modality: str) -> str | None:
    said = str(dataset.get("RecognizableVisualFeatures") or "").strip().upper()
    if said == "NO":
        return None
    if said != "YES" and dataset.get("SOPClassUID") == VLPhotographicImageStorage:
        return "photograph that does not say it shows no face"
    in_space = modality in ("ct", "mr") or dataset.get("SOPClassUID") in IN_SPACE
    return "recognisable face" if said == "YES" or (in_space and _is_a_face(dataset)) else None


def _is_a_face(dataset: Dataset) -> bool:
    """A head or neck in slices of at most `THIN_MM`.

    It is one by Body Part Examined, anatomic code, a word of its descriptions or the kind of object; slices of unknown
    thickness are taken as thin, and localizers are flat.
    """
    if is_localizer(dataset.get("ImageType")):
        return False
    return _is_head(dataset) and _slice_mm(dataset) <= THIN_MM


def _is_head(dataset: Dataset) -> bool:
    if dataset.get("SOPClassUID") == XRay3DCraniofacialImageStorage:
        return True
    part = str(dataset.get("BodyPartExamined") or "").upper()
    parts = {*re.split(r"[^A-Z]+", part), re.sub(r"[^A-Z]+", "", part)}
    anatomy = functional_group(dataset, 0, "FrameAnatomySequence")
    regions = [*(dataset.get("AnatomicRegionSequence") or ())]
    regions += anatomy.get("AnatomicRegionSequence") or () if anatomy is not None else ()
    codes = {str(region.get("CodeValue") or "") for region in regions}
    described = " ".join(str(dataset.get(name) or "") for name in DESCRIPTIONS).replace("_", " ")
    named = HEAD_WORDS.search(described) or (not part.strip() and LONE_WORDS.search(described))
    return bool(parts & HEAD_PARTS or codes & HEAD_CODES or named)


def _slice_mm(dataset: Dataset) -> float:
    """The smaller of thickness and distance of slices, 0 if it is not said."""
    measures = functional_group(dataset, 0, "PixelMeasuresSequence") or dataset
    said = [measures.get(name) for name in ("SliceThickness", "SpacingBetweenSlices")]
    sizes = [abs(float(size)) for size in said if size not in (None, "") and math.isfinite(float(size))]
    return min((size for size in sizes if size), default=0.0)


def _values(value: Any) -> list[object]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
