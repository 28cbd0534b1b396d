"""What the tests of the intake need: a site's pseudonyms, and objects with an identifier in every place there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from dicom_files import cells_of, image_object, item_of, picture
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from fedmed.imaging.plain_errors import plain_errors
from fedmed.intake.deidentify import deidentified
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import make_keys

NAME, NUMBER, WORD = "Quisling^Wilhelmina", "MRN8841907", "Zanzibarquux"
PLANTED = ("quisling", "wilhelmina", "8841907", "zanzibarquux")  # whatever the case, none of these may come out


def pseudonyms_in(folder: Path) -> Pseudonyms:
    return Pseudonyms(keys=make_keys(folder / "keys"))


def named_object(number: int = 1, *, series: int = 1, cells: np.ndarray | None = None, **tags: Any) -> Dataset:
    """A chest X-ray with everything that names its patient, study and machine."""
    cells = cells_of(picture()) if cells is None else cells
    named = {
        "PatientName": NAME, "PatientID": NUMBER, "PatientBirthDate": "19340301", "PatientSex": "F",
        "OtherPatientIDs": WORD, "AccessionNumber": "ACC8841907", "StudyID": WORD, "InstitutionName": WORD,
        "StudyInstanceUID": "1.2.3.8841907.1", "SeriesInstanceUID": f"1.2.3.8841907.1.{series}",
        "SOPInstanceUID": f"1.2.3.8841907.1.{series}.{number}", "FrameOfReferenceUID": "1.2.3.8841907.9",
        "StudyDate": "20240131", "AcquisitionDateTime": "20240131120000.5+0100", "StudyTime": "120000",
        "StudyDescription": f"Chest of {WORD}", "SeriesDescription": WORD, "PatientComments": WORD,
        "ImageComments": NAME, "ReferringPhysicianName": NAME, "OperatorsName": NAME, "StationName": WORD,
        "ViewPosition": "PA", "BodyPartExamined": "CHEST", "Modality": "DX", "Manufacturer": "Acme Imaging",
        "ManufacturerModelName": "Clear 3", "ImageType": ["ORIGINAL", "PRIMARY"], "PatientAge": "089Y",
        "BurnedInAnnotation": "NO", "InstanceNumber": str(number),
    }  # fmt: skip
    with plain_errors():  # pydicom warns of values that do not suit their VR, and some are meant to
        ds = image_object(cells, **(named | tags))
    ds.ReferencedImageSequence = [item_of(ReferencedSOPInstanceUID="1.2.3.8841907.1.1.2", PatientID=NUMBER)]
    block = ds.private_block(0x0011, WORD, create=True)
    block.add_new(0x01, "LO", NAME)
    ds.file_meta.SourceApplicationEntityTitle = "8841907"
    ds.preamble = b"8841907".ljust(128, b"\0")
    return ds


def with_text(text: str, *, size: int = 24, shape: tuple[int, int] = (512, 480), dark: bool = False) -> np.ndarray:
    """A smooth picture of 12 bits with text in its upper left corner."""
    layer = Image.new("L", shape[::-1])
    ImageDraw.Draw(layer).text((12, 10), text, fill=255, font=ImageFont.load_default(size=size))
    ink = np.asarray(layer) / 255
    ground = picture(shape) * 0.6 + (0.4 if dark else 0.0)
    return cells_of(ground * (1 - ink) + (0.0 if dark else 1.0) * ink)


def cleaned(ds: Dataset, pseudonyms: Pseudonyms) -> Dataset:
    """The object as `keep` has it de-identified: without a library's word about its values."""
    with plain_errors():
        return deidentified(ds, pseudonyms)
