"""What is left of an object: nothing that was planted in it, and everything that a network is trained on."""

import csv
import io
import string
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import cells_of, content_of, image_object, item_of, picture, written
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from intake_files import NAME, NUMBER, PLANTED, WORD, cleaned, named_object, pseudonyms_in
from phantom_series import Acquisition, enhanced_object, phantom_body
from pydicom.datadict import DicomDictionary, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless
from volumes_of import volumes_in

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.fingerprints import fingerprints
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.reading import read_frames, read_image
from fedmed.imaging.scanners import scanner_name
from fedmed.imaging.volumes import read_volume
from fedmed.imaging.volumes.volume import Volume
from fedmed.intake.allowed import ALLOWED, ENUMERATED
from fedmed.intake.pseudonyms import Pseudonyms

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "dicom"
TEXT = ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UN", "UR", "UT")
BYTES = ("OB", "OW", "UN")
KEYWORDS = {vr: [] for vr in TEXT}  # every element of the standard whose value is text
for _tag, (_vr, _count, _name, _retired, _keyword) in DicomDictionary.items():
    if _vr in KEYWORDS and _keyword and 0x0008 <= _tag >> 16 != 0x0028:
        KEYWORDS[_vr].append(_keyword)


@pytest.fixture(scope="module")
def pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Pseudonyms:
    return pseudonyms_in(tmp_path_factory.mktemp("site"))


def planted_in(content: bytes) -> list[str]:
    """Which planted words stand in some bytes, in any case, also with zero bytes between the letters."""
    plain = content.lower()
    return [word for word in PLANTED if word.encode() in plain or word.encode("utf-16-le") in plain]


def test_nothing_that_names_the_patient_is_in_the_bytes(pseudonyms: Pseudonyms):
    ds = named_object()
    assert set(planted_in(content_of(ds))) == set(PLANTED)
    clean = cleaned(ds, pseudonyms)
    assert not planted_in(content_of(clean))
    assert not any(element.tag.is_private for element in clean.iterall())


def test_says_what_was_done_to_it(pseudonyms: Pseudonyms):
    clean = cleaned(named_object(), pseudonyms)
    assert clean.PatientIdentityRemoved == "YES" and clean.LongitudinalTemporalInformationModified == "MODIFIED"
    assert [item.CodeValue for item in clean.DeidentificationMethodCodeSequence] == ["113100", "113107", "113108"]
    assert clean.PatientName == clean.PatientBirthDate == clean.StudyTime == clean.StudyID == ""
    assert clean.PatientID == pseudonyms.patient(NUMBER)
    assert clean.AccessionNumber == pseudonyms.accession("ACC8841907")
    assert clean.file_meta.MediaStorageSOPInstanceUID == clean.SOPInstanceUID == pseudonyms.uid("1.2.3.8841907.1.1.1")
    assert "SourceApplicationEntityTitle" not in clean.file_meta


@given(
    planted=st.lists(
        st.tuples(
            st.sampled_from(TEXT),
            st.integers(0, 10**6),
            st.sampled_from([NAME, NUMBER, WORD, f"of {WORD}", NUMBER[3:], NAME.upper().replace("^", "_")]),
            st.integers(0, 3),
        ),
        max_size=12,
    ),
    blob=st.sampled_from([NAME.encode(), WORD.encode("utf-16-le"), NUMBER.encode()]),
)
@example(planted=[("SH", KEYWORDS["SH"].index("ConvolutionKernel"), NUMBER[3:], 0)], blob=NAME.encode())
@example(planted=[("IS", KEYWORDS["IS"].index("ReferencedFrameNumber"), NUMBER[3:], 0)], blob=NAME.encode())
@example(planted=[("DS", KEYWORDS["DS"].index("FocalSpots"), NUMBER[3:], 0)], blob=NAME.encode())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_identifier_survives_in_any_text_element_at_any_depth(pseudonyms: Pseudonyms, planted, blob):
    ds = named_object()
    for vr, number, text, depth in planted:
        keyword = KEYWORDS[vr][number % len(KEYWORDS[vr])]
        holder = ds
        for _ in range(depth):  # an allowed sequence, so that its items are looked into
            if not holder.get("SharedFunctionalGroupsSequence"):
                holder.SharedFunctionalGroupsSequence = [Dataset()]
            holder = holder.SharedFunctionalGroupsSequence[0]
        if keyword not in (*ENUMERATED, "SOPClassUID", "SpecificCharacterSet"):
            value = text.encode() + b" " * (len(text) % 2)  # as it stands in a file, whether it suits its VR or not
            tag = BaseTag(tag_for_keyword(keyword))
            holder[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True, True)
    ds.add_new(0x60000022, "LO", WORD)  # an overlay's description
    ds.add_new(0x60003000, "OW", blob + blob[: len(blob) % 2])
    ds.add_new(0x50000010, "US", 7)  # a curve
    ds.EncapsulatedDocument = blob + b"\0" * (len(blob) % 2)
    with plain_errors():
        try:
            clean = cleaned(ds, pseudonyms)
        except UnreadableImage:  # an own UID was overwritten with what is none, or pixels cannot be read any more
            return
        content = content_of(clean)
    assert not planted_in(content)
    written_anew = {element.tag for element in cleaned(named_object(), pseudonyms).iterall()}
    assert {keyword_for_tag(element.tag) for element in clean.iterall() if element.tag not in written_anew} <= ALLOWED


def test_a_value_that_stays_is_emptied_where_it_holds_the_patients_name_or_number(pseudonyms: Pseudonyms):
    ds = named_object(
        Manufacturer="Quisling Imaging", ManufacturerModelName="Unit 8841907", BodyPartExamined="WILHELMINA",
        ImageType=["ORIGINAL", "MRN8841907"], ScanOptions="QUISLING_W", Laterality="MRN-8841907", Modality="QUISLING",
        SeriesNumber="8841907",
    )  # fmt: skip
    ds.PatientID = "8841907"
    clean = cleaned(ds, pseudonyms)
    assert clean.Manufacturer == clean.ManufacturerModelName == clean.BodyPartExamined == clean.ScanOptions == ""
    assert list(clean.ImageType) == ["ORIGINAL", ""] and "SeriesNumber" not in clean
    assert clean.Modality == "OTHER"
    assert cleaned(named_object(), pseudonyms).Manufacturer == "Acme Imaging"


@pytest.mark.parametrize(
    ("name", "region", "left"),
    [
        ("Müller^Änne", "Müller Tumor", ""),
        ("Müller^Änne", "Tumor_a\u0308nne", ""),
        ("Müller^Änne", "Tumor links", "Tumor links"),
        ("Li^Wei", "Li Tumor", ""),
        ("Li^Wei", "Liver", "Liver"),
        ("Doe^John^L", "Lung L", "Lung L"),
        ("Prostate-AEC-001", "Prostate", "Prostate"),
        ("Prostate-AEC-001", "AEC Prostate", ""),
        ("PANCREAS_0001", "Pancreas", "Pancreas"),
        ("PANCREAS_0001", "Pancreas 0001", ""),
        ("LUNG1-001", "GTV Lung 1", "GTV Lung 1"),
        ("LUNG8841907", "Lung 8841907", ""),
        ("Colon^Maria", "Colon", ""),
        ("Colon, Maria 2", "Colon", ""),
        ("Quisling-001", "GTV Quisling", ""),
    ],
)
def test_names_of_regions_name_nobody_in_any_alphabet(name: str, region: str, left: str, pseudonyms: Pseudonyms):
    ds = named_object(PatientName=name, StructureSetROISequence=[item_of(ROINumber=1, ROIName=region)])
    ds.SegmentSequence = [item_of(SegmentNumber=1, SegmentLabel=region)]
    ds.SpecificCharacterSet = "ISO_IR 192"
    clean = cleaned(pydicom.dcmread(io.BytesIO(content_of(ds))), pseudonyms)
    assert clean.StructureSetROISequence[0].ROIName == clean.SegmentSequence[0].SegmentLabel == left


def test_codes_stay_without_their_words_and_only_those_of_published_schemes(pseudonyms: Pseudonyms):
    chest = item_of(CodeValue="51185008", CodingSchemeDesignator="SCT", CodeMeaning=f"Chest of {WORD}")
    own = item_of(CodeValue="WILHELMINA", CodingSchemeDesignator="99HOSPITAL", CodeMeaning="ward 4")
    clean = cleaned(named_object(AnatomicRegionSequence=[chest, own]), pseudonyms)
    assert [item.CodeValue for item in clean.AnatomicRegionSequence] == ["51185008"]
    assert not planted_in(content_of(clean))


def test_dates_of_a_patient_move_by_one_number_of_days(pseudonyms: Pseudonyms):
    first = cleaned(named_object(StudyDate="20240131", AcquisitionDate="20240131"), pseudonyms)
    later = cleaned(named_object(StudyDate="20240314"), pseudonyms)
    moved = [np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:]}") for d in (first.StudyDate, later.StudyDate)]
    assert (moved[1] - moved[0]).astype(int) == 43 and first.StudyDate == first.AcquisitionDate != "20240131"
    assert 1 <= (np.datetime64("2024-01-31") - moved[0]).astype(int) <= 364
    assert first.AcquisitionDateTime == f"{first.StudyDate}120000.5"  # without the time zone, which names a place
    for wrong in ("2024", "20241301", "31.01.2024", "00010101"):
        assert cleaned(named_object(StudyDate=wrong), pseudonyms).StudyDate == ""


@pytest.mark.parametrize(
    ("tags", "age"),
    [
        ({"PatientAge": "089Y"}, "089Y"),
        ({"PatientAge": "090Y"}, "090Y"),
        ({"PatientAge": "104Y"}, "090Y"),
        ({"PatientAge": "011M"}, "011M"),
        ({"PatientAge": "old"}, "089Y"),  # from the birthday, one day before which she is 89
        ({"PatientAge": None, "StudyDate": "20240301"}, "090Y"),
        ({"PatientAge": None, "PatientBirthDate": "19200101"}, "090Y"),
        ({"PatientAge": None, "PatientBirthDate": ""}, None),
    ],
)
def test_no_age_above_ninety_comes_out(pseudonyms: Pseudonyms, tags: dict[str, str], age: str | None):
    assert cleaned(named_object(**tags), pseudonyms).get("PatientAge") == age


def test_uids_are_the_same_wherever_they_stand_and_the_standards_own_stay(pseudonyms: Pseudonyms):
    clean = cleaned(named_object(), pseudonyms)
    other = cleaned(named_object(2), pseudonyms)
    assert clean.ReferencedImageSequence[0].ReferencedSOPInstanceUID == other.SOPInstanceUID
    assert clean.StudyInstanceUID == other.StudyInstanceUID != "1.2.3.8841907.1"
    assert clean.SOPClassUID == named_object().SOPClassUID
    labels = cleaned(named_object(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.7"), pseudonyms)
    assert labels.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.7"  # newer than pydicom's dictionary


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"])
def test_refuses_an_object_that_lacks_a_uid(pseudonyms: Pseudonyms, keyword: str):
    with pytest.raises(UnreadableImage, match=f"header lacks {keyword}"):
        cleaned(named_object(**{keyword: None}), pseudonyms)


def jpeg_with_comment() -> Dataset:
    ds = named_object(cells=cells_of(picture(), 8).astype(np.uint8), bits=8)
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(ds.pixel_array).save(buffer, "jpeg", quality=95, comment=NAME.encode())
    ds.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return ds


def test_comments_within_compressed_pixels_are_blanked_and_the_picture_is_the_same(
    pseudonyms: Pseudonyms, tmp_path: Path
):
    ds = jpeg_with_comment()
    assert b"Quisling" in ds.PixelData
    clean = cleaned(ds, pseudonyms)
    assert not planted_in(content_of(clean))
    before, after = (written(one, tmp_path / name) for one, name in ((ds, "a"), (clean, "b")))
    assert (read_image(before) == read_image(after)).all()


def test_a_comment_in_jpeg_2000_is_blanked(pseudonyms: Pseudonyms, tmp_path: Path):
    ds = named_object(syntax=JPEG2000Lossless)
    (frame,) = pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)
    text = NAME.encode()
    comment = b"\xff\x64" + (4 + len(text)).to_bytes(2) + b"\0\1" + text
    size = 2 + 2 + int.from_bytes(frame[4:6])  # SOC and SIZ
    ds.PixelData = pydicom.encaps.encapsulate([frame[:size] + comment + frame[size:]])
    clean = cleaned(ds, pseudonyms)
    assert not planted_in(content_of(clean))
    before, after = (written(one, tmp_path / name) for one, name in ((ds, "a"), (clean, "b")))
    assert (read_image(before) == read_image(after)).all()


def test_compressed_pixels_without_text_keep_every_byte(pseudonyms: Pseudonyms):
    ds = named_object(syntax=JPEGLSLossless)
    assert cleaned(ds, pseudonyms).PixelData == ds.PixelData


@pytest.mark.parametrize("kind", ["u2", "i2"])
def test_bits_that_no_value_uses_are_cleared_and_the_values_stay(pseudonyms: Pseudonyms, kind: str, tmp_path: Path):
    values = cells_of(picture(), 11).astype(np.int16) - (1024 if kind == "i2" else 0)
    cells = (values & 0x0FFF).astype(np.uint16)
    hidden = (np.indices(cells.shape).sum(axis=0) % 7 == 0).astype(np.uint16) << 14  # an old overlay
    ds = named_object(cells=(cells | hidden).view(kind))
    clean = cleaned(ds, pseudonyms)
    stored = np.frombuffer(clean.PixelData, kind).reshape(cells.shape)
    assert (stored == values).all()
    before, after = (written(one, tmp_path / name) for one, name in ((ds, "a"), (clean, "b")))
    assert (read_image(before) == read_image(after)).all()


def test_what_follows_the_pixels_goes(pseudonyms: Pseudonyms):
    ds = named_object()
    ds.PixelData += WORD.encode()
    assert cleaned(ds, pseudonyms).PixelData == named_object().PixelData


def test_an_enhanced_object_is_the_same_volume(pseudonyms: Pseudonyms, tmp_path: Path):
    body, _ = phantom_body(Acquisition().shape)
    ds = enhanced_object(body, Acquisition())
    clean = cleaned(ds, pseudonyms)
    before, after = (read_volume(written(one, tmp_path / name)) for one, name in ((ds, "a"), (clean, "b")))
    assert (before.values == after.values).all() and np.allclose(before.affine, after.affine)
    assert before.units == after.units


def test_an_object_is_not_changed_itself(pseudonyms: Pseudonyms):
    ds = named_object()
    before = content_of(ds)
    cleaned(ds, pseudonyms)
    assert content_of(ds) == before


@given(text=st.text(string.printable, max_size=20))
def test_pseudonyms_are_the_same_again_and_never_what_they_stand_for(pseudonyms: Pseudonyms, text: str):
    name = pseudonyms.patient(text)
    assert name == pseudonyms.patient(f" {text.lower()}  ") or not text.isascii() or "\0" in text
    assert len(name) == 17 and name.isalnum() and 1 <= pseudonyms.days(text) <= 364
    assert pydicom.uid.UID(pseudonyms.uid(text)).is_valid
    assert len(pseudonyms.accession(text)) in (0, 16)


def test_another_site_makes_other_pseudonyms(pseudonyms: Pseudonyms, tmp_path: Path):
    other = pseudonyms_in(tmp_path)
    assert other.patient(NUMBER) != pseudonyms.patient(NUMBER) and other.uid("1.2.3") != pseudonyms.uid("1.2.3")
    assert pseudonyms.patient(NUMBER) != pseudonyms.patient(NUMBER[:-1]) and pseudonyms.accession(" ") == ""


def seen(path: Path, preset: str) -> list[np.ndarray] | str:
    try:
        return list(read_frames(path, preset))
    except UnreadableImage as error:
        return str(error)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real DICOM files are not here")
def test_real_files_give_the_same_pictures_and_fingerprints(pseudonyms: Pseudonyms, tmp_path: Path):
    with (DATA / "dev" / "manifest.csv").open(newline="") as file:
        paths = [DATA / row["path"] for row in csv.DictReader(file) if row["expected"] == "decodes"]
    whole = [path for path in paths if "series" not in path.parts]
    compared, without_uid = 0, 0
    for path in whole:
        try:
            with plain_errors():
                clean = cleaned(open_dicom(path), pseudonyms)
        except UnreadableImage:
            without_uid += 1
            continue
        after = written(clean, tmp_path / "after.dcm")
        for preset in ("cxr-sc", "color"):
            one, two = seen(path, preset), seen(after, preset)
            if isinstance(one, str) or isinstance(two, str):
                assert one == two
            else:
                assert all((a == b).all() for a, b in zip(one, two, strict=True))
        assert (fingerprints(path) == fingerprints(after)).all()
        compared += 1
    assert compared > 150 and without_uid <= 10


@pytest.mark.skipif(not DATA.is_dir(), reason="the real DICOM files are not here")
@pytest.mark.parametrize("name", ["ct_philips_phantom_std", "mr_siemens_t1post_pgbm003", "torchio_tests"])
def test_real_series_give_the_same_volumes_and_scanners(pseudonyms: Pseudonyms, tmp_path: Path, name: str):
    for path in (DATA / "dev" / "series" / name).iterdir():
        try:
            with plain_errors():
                clean = cleaned(open_dicom(path), pseudonyms)
        except UnreadableImage:
            continue  # a directory of files among the slices
        assert scanner_name(written(clean, tmp_path / f"{clean.SOPInstanceUID}.dcm")) == scanner_name(path)
    before, after = (list(volumes_in(folder)) for folder in (DATA / "dev" / "series" / name, tmp_path))
    for one, two in zip(before, after, strict=True):
        assert isinstance(one, Volume) and isinstance(two, Volume)
        assert (one.values == two.values).all() and np.allclose(one.affine, two.affine)
        assert (one.modality, one.units) == (two.modality, two.units)


def test_a_plain_object_without_a_name_is_deidentified_too(pseudonyms: Pseudonyms):
    ds = image_object(
        cells_of(picture()), PatientID=None, PatientName=None, SeriesInstanceUID="1.2", StudyInstanceUID="1"
    )
    assert cleaned(ds, pseudonyms).PatientID == ""


def test_a_name_that_stands_by_chance_in_a_term_of_the_standard_does_not_empty_it(pseudonyms: Pseudonyms):
    tags = {"ImageType": ["ORIGINAL", "PRIMARY", "MARYLAND"], "BodyPartExamined": "THORAX", "SeriesDescription": ""}
    clean = cleaned(named_object(PatientName="Mary^Thor", **tags), pseudonyms)
    assert list(clean.ImageType) == ["ORIGINAL", "PRIMARY", ""] and clean.BodyPartExamined == "THORAX"
    clean = cleaned(named_object(PatientName="Primary^Thorax", **tags), pseudonyms)
    assert list(clean.ImageType)[:2] == ["ORIGINAL", ""] and clean.BodyPartExamined == ""
