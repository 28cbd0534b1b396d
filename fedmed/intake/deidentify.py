"""A DICOM object without whom it shows: DICOM PS3.15 Annex E, the Basic Profile as a list of what may stay.

Two of the profile's options are taken (PS3.15 E.3): dates move by one keyed number of days per patient, so that
intervals survive (Retain Longitudinal Temporal Information Modified Dates), and sex and age stay, age up to 89 (Retain
Patient Characteristics). Pixels are not cleaned: what shows a name is set apart, see `quarantine`.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from unicodedata import normalize

from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID

from fedmed.errors import UnreadableImage
from fedmed.intake.allowed import ALLOWED, ANATOMY, ENUMERATED, SCHEMES, TERMS
from fedmed.intake.persons import OLDEST
from fedmed.intake.pixels import cleaned_pixels_
from fedmed.intake.pseudonyms import Pseudonyms, registered

OWN_UIDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")  # Type 1
OURS = "fedmed:"  # how Deidentification Method (0012,0063) begins
METHODS = {  # PS3.16 CID 7050
    "113100": "Basic Application Confidentiality Profile",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
}
IDENTIFIERS = ("PatientID", "OtherPatientIDs", "AccessionNumber", "AdmissionID", "PatientBirthDate", "StudyID")
EMPTY = (
    "StudyTime",
    "ReferringPhysicianName",
    "PatientName",
    "PatientBirthDate",
    "StudyID",
)  # Type 2: there, and empty
NUMBERS = ("SeriesNumber", "InstanceNumber", "AcquisitionNumber", "ContourNumber")  # that somebody may have typed
LONG_NUMBER = 6  # digits of a whole number that is no patient's number by chance, wherever it stands
SHORTEST_NAME = 2  # letters of a name that is looked for in a region's: initials would empty "Lung L"
SHORTEST_WORD, SHORTEST_PART = 3, 4  # of one that is looked for as a word of other values, and within words
NAMED = ("SegmentLabel", "ROIName")
NUMBERED = re.compile(r"[A-Za-z0-9_.-]*[0-9][A-Za-z0-9_.-]*")  # a patient's code where a name would stand
REGION = re.compile(r"[A-Za-z][A-Za-z0-9 _+.,()/-]{0,47}")
CODE = re.compile(r"[A-Z0-9 _/-]{1,16}", re.IGNORECASE)
TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
DATE_TIME = re.compile(r"(\d{8})(\d{0,6}(?:\.\d{1,6})?)(?:[+-]\d{4})?")
AGE = re.compile(r"(\d{3})([DWMY])")
BYTES = ("OB", "OD", "OF", "OL", "OV", "OW")
BINARY = ("AT", "FD", "FL", "SL", "SS", "SV", "UL", "US", "UV", *BYTES)


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """What the elements of one object are changed by."""

    pseudonyms: Pseudonyms
    back: timedelta
    words: frozenset[str]  # of the people and numbers that the object names, see `_folded`


def deidentified(dataset: Dataset, pseudonyms: Pseudonyms) -> Dataset:
    """A new object of what may stay of another one, with keyed UIDs and moved dates.

    Whatever could be free text is gone, also from nested sequences; so are private elements, curves and overlays, the
    preamble, and comments within compressed pixels. The pixels decode to the same values. Where a value that stays
    holds a word of a person's name or a number of the patient, it is emptied.

    Args:
        dataset: of one instance, with its file meta information. It is not changed.
        pseudonyms: of the site.

    Raises:
        UnreadableImage: it lacks a UID of its own, of its series or of its study, or its pixels are not what it says.
        Exception: whatever pydicom raises where values cannot be read; see `plain_errors`.
    """
    for keyword in OWN_UIDS:
        if not dataset.get(keyword):
            raise UnreadableImage(f"header lacks {keyword}")
    patient = str(dataset.get("PatientID") or "")
    rules = _Rules(
        pseudonyms=pseudonyms,
        back=timedelta(days=pseudonyms.days(patient or str(dataset.get("StudyInstanceUID") or ""))),
        words=frozenset(_words(dataset)),
    )
    kept = _kept(dataset, rules)
    kept.SpecificCharacterSet = "ISO_IR 192"
    for keyword in EMPTY:
        setattr(kept, keyword, "")
    kept.PatientID = pseudonyms.patient(patient) if patient.strip() else ""
    kept.AccessionNumber = pseudonyms.accession(str(dataset.get("AccessionNumber") or ""))
    if age := _age(dataset):
        kept.PatientAge = age
    kept.PatientIdentityRemoved = "YES"
    kept.DeidentificationMethod = f"{OURS} PS3.15 Basic Profile, as a list of what may stay"
    kept.DeidentificationMethodCodeSequence = [_code(value, meaning) for value, meaning in METHODS.items()]
    kept.LongitudinalTemporalInformationModified = "MODIFIED"
    kept.file_meta = _file_meta(dataset, kept)
    cleaned_pixels_(kept)
    return kept


def is_ours(dataset: Dataset) -> bool:
    """Whether fedmed de-identified an object before."""
    return any(str(value).startswith(OURS) for value in _values(dataset.get("DeidentificationMethod")))


def _kept(dataset: Dataset, rules: _Rules) -> Dataset:
    """What may stay of an object or of an item of a sequence."""
    kept = Dataset()
    implicit, little = dataset.original_encoding
    kept.set_original_encoding(implicit, little, "utf8")
    for tag in sorted(dataset.keys()):  # an element is parsed when it is asked for: what goes never is
        if tag.is_private or keyword_for_tag(tag) not in ALLOWED:
            continue
        element = _read(dataset, tag)
        if element is None:
            continue
        if element.VR == "SQ":
            items = [_kept(item, rules) for item in element.value if _is_standard(item)]
            kept.add(DataElement(tag, "SQ", Sequence(items)))
            continue
        values = _values(element.value)
        if element.value is not None and None not in (changed := [_value(element, one, rules) for one in values]):
            kept.add(DataElement(tag, element.VR, changed if len(changed) != 1 else changed[0]))
    return kept


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, MultiValue | list) else [value]


def _read(dataset: Dataset, tag: BaseTag) -> DataElement | None:
    """An element, None if its value is not what its VR says: then nothing can be said of it, and it goes."""
    try:
        return dataset[tag]
    except (ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError):
        return None


def _value(element: DataElement, value: Any, rules: _Rules) -> Any:
    """One value as it may stay; "" where it may not but its place counts, None = the element goes."""
    text = str(value).strip(" \0")
    match element.VR:
        case "UI":
            return text if not text or registered(text) else rules.pseudonyms.uid(text)
        case "DA" | "DT":
            return _moved(text, rules.back)
        case "TM":
            return text if TIME.fullmatch(text) else None
        case "AS":
            return _capped(text)
        case "DS" | "IS":
            typed = element.keyword in NUMBERS or (len(text) >= LONG_NUMBER and text.lstrip("+-").isdecimal())
            return value if _is_number(text) and not (typed and _folded(text) in rules.words) else None
        case "CS" | "LO" | "SH":
            return _word(element.keyword, text, rules.words)
        case _:
            known = all(part in BINARY for part in element.VR.split(" or "))
            return value if known else None


def _word(keyword: str, text: str, words: frozenset[str]) -> str:
    """A short text, emptied where it may be more than its keyword asks for."""
    if keyword in ENUMERATED:
        return text if not text or text in ENUMERATED[keyword] else "OTHER"  # which is refused where "" would pass
    if keyword == "CodeMeaning":
        return "see the code"
    form = REGION if keyword in (*NAMED, "Manufacturer", "ManufacturerModelName") else CODE
    least = SHORTEST_NAME if keyword in NAMED else SHORTEST_WORD
    if _names(text, words, least):  # before letters of other alphabets go
        return ""
    if not form.fullmatch(text) and text:
        text = "".join(letter if form.fullmatch("A" + letter) else " " for letter in text)[:48].strip()
    return "" if _names(text, words, least) else text


def _names(text: str, words: frozenset[str], least: int) -> bool:
    """Whether a text holds one of some words, as a word of at least so many letters or within one.

    Within a term of the standard no word is looked for, only as the whole of it.
    """
    whole, is_term = _folded(text), text.casefold() in TERMS
    found = {_folded(part) for part in (*re.split(r"[\W_]+", text), *re.split(r"[^A-Za-z0-9]+", text))} | {whole}
    return any(
        word in (found if is_term or len(word) < SHORTEST_PART else whole) for word in words if len(word) >= least
    )


def _words(dataset: Dataset) -> Iterator[str]:
    """Everything that names a person or a number of the patient, anywhere in the object."""
    for tag in list(dataset.keys()):
        if tag.is_private:
            continue
        vr, keyword = dictionary_VR(tag) if dictionary_has_tag(tag) else "", keyword_for_tag(tag)
        if vr == "SQ":
            element = _read(dataset, tag)
            for item in element.value if element is not None and element.VR == "SQ" else ():
                yield from _words(item)
        elif (vr == "PN" or keyword in IDENTIFIERS) and (element := _read(dataset, tag)) is not None:
            separators = r"\W+|_" if vr == "PN" else r"\\"
            least = SHORTEST_NAME if vr == "PN" else SHORTEST_WORD
            coded = vr == "PN" and NUMBERED.fullmatch(str(element.value))  # "PANCREAS_0001", and not "Colon^Maria"
            for part in re.split(separators, str(element.value)):
                if len(word := _folded(part)) >= least:
                    if not coded or word.rstrip(string.digits) not in ANATOMY:
                        yield word
                    yield from re.findall(rf"[0-9]{{{SHORTEST_PART},}}", word)  # without the letters before it


def _folded(text: str) -> str:
    """Letters and digits alone, so that DOE^JANE, "Doe, Jane" and doe_jane are one."""
    return "".join(letter for letter in normalize("NFKC", text).casefold() if letter.isalnum())


def _is_standard(item: Dataset) -> bool:
    """Whether an item of a code sequence has a code of a published scheme: a hospital's own could say anything."""
    return "CodeMeaning" not in item or str(item.get("CodingSchemeDesignator") or "") in SCHEMES


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _moved(text: str, back: timedelta) -> str:
    """A date (DA) or date and time (DT) so much earlier; "" where it is not a whole date. A time zone names a place."""
    found = DATE_TIME.fullmatch(text.replace(".", "", 2) if re.fullmatch(r"\d{4}\.\d{2}\.\d{2}", text) else text)
    try:
        day = date.fromisoformat(found[1]) - back if found else None
    except (ValueError, OverflowError):
        day = None
    return f"{day:%Y%m%d}{found[2]}" if found and day else ""


def _capped(text: str) -> str:
    """An age (AS) of at most 90 years."""
    found = AGE.fullmatch(text.upper())
    if not found:
        return ""
    return f"{OLDEST:03d}Y" if found[2] == "Y" and int(found[1]) >= OLDEST else found[0]


def _age(dataset: Dataset) -> str:
    """Age at the study from the date of birth, where the header does not give it itself; "" if neither does."""
    if _capped(str(dataset.get("PatientAge") or "")):
        return ""
    try:
        born, seen = (date.fromisoformat(str(dataset.get(name) or "")) for name in ("PatientBirthDate", "StudyDate"))
    except ValueError:
        return ""
    years = seen.year - born.year - ((seen.month, seen.day) < (born.month, born.day))
    return _capped(f"{years:03d}Y") if 0 <= years < 1000 else ""


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _file_meta(dataset: Dataset, kept: Dataset) -> FileMetaDataset:
    """Of the source only its transfer syntax: the rest says which machines sent it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kept.SOPClassUID, kept.SOPInstanceUID
    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return meta
