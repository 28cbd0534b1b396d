"""What is kept of an object, where, and what is set apart for a person to look at."""

import csv
import hashlib
import stat
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import cells_of, content_of, item_of, picture, written
from intake_files import NUMBER, PLANTED, named_object, pseudonyms_in, with_text
from PIL import Image, ImageDraw, ImageFont
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    MRImageStorage,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    VLPhotographicImageStorage,
    XRay3DAngiographicImageStorage,
    XRay3DCraniofacialImageStorage,
)

import fedmed.intake.keep as keeping
from fedmed.errors import UnreadableImage
from fedmed.federated.phantoms import make_phantoms
from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.intake import tesseract
from fedmed.intake.burned_in import READ, SHAPED, lines_of_text, text_in
from fedmed.intake.keep import keep
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.quarantine import header_reason, pixel_reason, quarantined
from fedmed.intake.tables import table_rows

HEAD = {"SOPClassUID": MRImageStorage, "Modality": "MR", "BodyPartExamined": "BRAIN"}
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="module")
def pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Pseudonyms:
    return pseudonyms_in(tmp_path_factory.mktemp("site"))


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_image_is_kept_under_keyed_names_for_its_owner_alone(pseudonyms: Pseudonyms, tmp_path: Path):
    kept = keep(written(named_object(), tmp_path / f"{NUMBER}.dcm"), tmp_path / "out", pseudonyms)
    assert kept.reason is None and kept.path == tmp_path / "out" / kept.image
    assert kept.image.split("/")[:2] == ["images", pseudonyms.patient(NUMBER)]
    assert (kept.view, kept.age, kept.sex, kept.modality) == ("PA", "89", "F", "DX")
    assert kept.accession == pseudonyms.accession("ACC8841907")
    assert kept.study_uid == pseudonyms.uid("1.2.3.8841907.1") and kept.patient_id == pseudonyms.patient(NUMBER)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert not any(word in str(path.relative_to(tmp_path)).lower() for word in PLANTED)
        assert path.is_dir() or not any(word.encode() in path.read_bytes().lower() for word in PLANTED)
    ds = pydicom.dcmread(kept.path)
    assert ds.PatientIdentityRemoved == "YES"
    assert (ds.pixel_array == named_object().pixel_array).all()


@pytest.mark.parametrize(("said", "age"), [("035M", "2"), ("011M", "0"), ("104Y", "90"), ("061Y", "61")])
def test_an_age_is_in_years(said: str, age: str, pseudonyms: Pseudonyms, tmp_path: Path):
    assert keep(named_object(PatientAge=said), tmp_path, pseudonyms).age == age


def test_to_keep_an_object_again_changes_nothing(pseudonyms: Pseudonyms, tmp_path: Path):
    first = keep(named_object(), tmp_path, pseudonyms)
    apart = keep(named_object(2, BurnedInAnnotation="YES"), tmp_path, pseudonyms)
    before = content(tmp_path)
    assert keep(named_object(), tmp_path, pseudonyms) == first
    assert keep(named_object(2, BurnedInAnnotation="YES"), tmp_path, pseudonyms) == apart
    assert content(tmp_path) == before


def test_what_a_person_moved_out_of_quarantine_stays_among_the_images(pseudonyms: Pseudonyms, tmp_path: Path):
    apart = keep(named_object(BurnedInAnnotation="YES"), tmp_path, pseudonyms)
    assert apart.path is None and apart.set_apart
    with (tmp_path / "quarantine.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["reason"] == apart.reason and row["image"] == apart.image
    (tmp_path / row["image"]).parent.mkdir(parents=True)
    (tmp_path / row["file"]).rename(tmp_path / row["image"])
    again = keep(named_object(BurnedInAnnotation="YES"), tmp_path, pseudonyms)
    assert again.path == tmp_path / row["image"] and again.reason is None


def test_every_object_set_apart_has_a_row_whatever_the_names_and_the_table_is_not_read_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads, path = [], tmp_path / "quarantine.csv"
    monkeypatch.setattr(keeping, "table_rows", lambda path: reads.append(path) or table_rows(path))
    for file in ("quarantine/11.dcm", "quarantine/1.dcm", "1.dcm", "quarantine/1.dcm"):
        keeping._note(path, (file, "images/1", "secondary capture", "in quarantine"))
    rows = path.read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["file", "quarantine/11.dcm", "quarantine/1.dcm", "1.dcm"]
    assert reads == []
    path.write_text("\n".join([*rows, "2.dcm,images/2,secondary capture,in quarantine", ""]))  # another process
    keeping._note(path, ("2.dcm", "images/2", "secondary capture", "in quarantine"))
    assert len(path.read_text().splitlines()) == 5 and reads == [path]


def test_reports_and_localizers_are_not_written_and_masks_are(pseudonyms: Pseudonyms, tmp_path: Path):
    report = keep(named_object(SOPClassUID=BasicTextSRStorage), tmp_path, pseudonyms)
    assert (report.path, report.reason, report.set_apart) == (None, "a report, not an image", False)
    assert content(tmp_path) == {}
    scout = {"SOPClassUID": CTImageStorage, "Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    assert keep(named_object(**scout), tmp_path, pseudonyms).reason == "a localizer, not a slice of a volume"
    assert content(tmp_path) == {}
    regions = [item_of(ROINumber=1, ROIName="Left lung"), item_of(ROINumber=2, ROIName="GTV Quisling")]
    mask = keep(
        named_object(SOPClassUID=RTStructureSetStorage, StructureSetROISequence=regions, PixelData=None),
        tmp_path,
        pseudonyms,
    )
    assert [roi.ROIName for roi in pydicom.dcmread(mask.path).StructureSetROISequence] == ["Left lung", ""]


def test_a_damaged_file_says_a_reason_that_names_nothing(pseudonyms: Pseudonyms, tmp_path: Path):
    for name, text in (("text", b"Quisling"), ("empty", b""), ("half", content_of(named_object())[:-99])):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(UnreadableImage) as caught:
            keep(tmp_path / name, tmp_path / "out", pseudonyms)
        assert str(tmp_path) not in str(caught.value) and "Quisling" not in str(caught.value)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({}, None),
        ({"PatientID": ""}, "no patient id"),
        ({"BurnedInAnnotation": "YES"}, "burned-in annotation, says its header"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary capture"),
        ({"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}, "screen save"),
        ({"SOPClassUID": UltrasoundImageStorage, "BurnedInAnnotation": "NO"}, None),
        (
            {"SOPClassUID": UltrasoundImageStorage, "BurnedInAnnotation": None},
            "ultrasound that does not say it is free of text",
        ),
        (HEAD | {"SliceThickness": "1"}, "recognisable face"),
        (HEAD | {"SliceThickness": "3"}, "recognisable face"),
        (HEAD | {"SliceThickness": "5"}, None),
        (HEAD | {"SliceThickness": "5", "SpacingBetweenSlices": "2.5"}, "recognisable face"),
        (HEAD, "recognisable face"),  # of unknown thickness
        (HEAD | {"SliceThickness": "1", "RecognizableVisualFeatures": "NO"}, None),  # faces were removed
        (HEAD | {"SliceThickness": "5", "RecognizableVisualFeatures": "YES"}, "recognisable face"),
        (HEAD | {"SliceThickness": "1", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, None),
        (HEAD | {"SliceThickness": "1", "ImageType": ["ORIGINAL", "PRIMARY", "TOPOGRAM"]}, None),
        (HEAD | {"SliceThickness": "1", "ImageType": ["ORIGINAL", "LOCALIZER"]}, "recognisable face"),  # not its place
        (HEAD | {"BodyPartExamined": "", "SeriesDescription": "t1_head_sag"}, "recognisable face"),
        (HEAD | {"BodyPartExamined": "", "StudyDescription": "MRT Schädel nativ"}, "recognisable face"),
        (HEAD | {"BodyPartExamined": "HEART"}, None),  # which has an EAR in it
        (HEAD | {"BodyPartExamined": "", "SOPClassUID": CTImageStorage}, None),
        (
            HEAD | {"BodyPartExamined": "", "AnatomicRegionSequence": [item_of(CodeValue="69536005")]},
            "recognisable face",
        ),
        ({"BodyPartExamined": "SKULL"}, None),  # a radiograph has no face to render
        ({"RecognizableVisualFeatures": "YES"}, "recognisable face"),  # of any modality
        ({"SOPClassUID": XRay3DCraniofacialImageStorage}, "recognisable face"),
        ({"SOPClassUID": XRay3DAngiographicImageStorage, "BodyPartExamined": "HEAD"}, "recognisable face"),
        ({"SOPClassUID": XRay3DAngiographicImageStorage}, None),  # of a chest
        ({"SOPClassUID": VLPhotographicImageStorage}, "photograph that does not say it shows no face"),
        ({"SOPClassUID": VLPhotographicImageStorage, "RecognizableVisualFeatures": "NO"}, None),
        (HEAD | {"BodyPartExamined": "NECK", "SliceThickness": "1"}, "recognisable face"),
        (HEAD | {"BodyPartExamined": "C-SPINE", "SliceThickness": "1"}, "recognisable face"),
        (HEAD | {"BodyPartExamined": "CAROTID", "SliceThickness": "5"}, None),
        (HEAD | {"BodyPartExamined": "", "SeriesDescription": "Angio Carotis"}, "recognisable face"),
        *(
            (HEAD | {"BodyPartExamined": "", "SeriesDescription": text}, "recognisable face")
            for text in ("Sinus_axial 1mm", "t2 orbits", "HYPOPHYSE cor", "CCT nativ", "cMRT", "NNH2", "IAC 0.6", "tmj")
        ),
        *(
            (HEAD | {"BodyPartExamined": "", "SeriesDescription": text}, None)
            for text in (
                "CCTA",
                "CMR short axis",
                "sinusoidal test",
                "cardiac orbiter",
                "diaphragm",
                "Adnexe Kieferle",
                "NCCT THORAX",
            )
        ),
        *(
            (HEAD | {"BodyPartExamined": part, "SeriesDescription": text}, None)
            for part, text in (
                ("CHEST", "NCCT"),
                ("HEART", "Sinus of Valsalva"),
                ("FOOT", "sinus tarsi"),
                ("HEART", "CCT"),
            )
        ),
        (HEAD | {"BodyPartExamined": "CHEST", "SeriesDescription": "head and chest"}, "recognisable face"),
    ],
)
def test_the_header_says_what_a_person_must_look_at(tags: dict[str, object], reason: str | None):
    ds = named_object(**{"StudyDescription": "", "SeriesDescription": ""} | tags)
    assert header_reason(ds) == reason
    assert quarantined(ds) == reason


def test_an_enhanced_head_is_known_by_its_functional_groups():
    measures = item_of(PixelMeasuresSequence=[item_of(SliceThickness="1.2")])
    ds = named_object(**HEAD, SharedFunctionalGroupsSequence=[measures])
    assert header_reason(ds) == "recognisable face"
    measures.PixelMeasuresSequence[0].SliceThickness = "6"
    assert header_reason(ds) is None


@pytest.mark.parametrize("text", ["QUISLING^WILHELMINA", "Quisling, Wilhelmina 12.03.1950", "MRN8841907"])
@pytest.mark.parametrize(
    ("size", "shape"), [(12, (512, 480)), (24, (512, 480)), (36, (512, 480)), (24, (1400, 1200)), (72, (1400, 1200))]
)
@pytest.mark.parametrize("dark", [False, True])
def test_burnt_in_names_are_seen(text: str, size: int, shape: tuple[int, int], dark: bool):
    cells = with_text(text, size=size, shape=shape, dark=dark)
    assert lines_of_text(cells) > 0
    assert lines_of_text(np.rot90(cells)) > 0


@pytest.mark.parametrize("marker", ["", "L", "R", "PA", "L AP"])
def test_side_markers_are_no_text(marker: str):
    assert lines_of_text(with_text(marker)) == 0


def test_a_few_pixels_far_outside_the_range_hide_no_text():
    cells = with_text("QUISLING^WILHELMINA")
    cells[300, 300] = 65535
    assert lines_of_text(cells) > 0
    text = cells_of(picture((512, 480)))
    text[with_text("QUISLING", size=16) == 4095] = 65535
    assert lines_of_text(text) > 0


def test_an_object_with_a_burnt_in_name_is_set_apart_with_its_tags_removed(pseudonyms: Pseudonyms, tmp_path: Path):
    kept = keep(named_object(cells=with_text("QUISLING^WILHELMINA")), tmp_path, pseudonyms)
    assert (kept.path, kept.reason, kept.set_apart) == (None, READ if tesseract.installed() else SHAPED, True)
    (file,) = (tmp_path / "quarantine").iterdir()
    assert not any(word.encode() in file.read_bytes().lower() for word in PLANTED)
    assert not (tmp_path / "images").exists()


def test_pixels_that_no_decoder_reads_are_set_apart(pseudonyms: Pseudonyms, tmp_path: Path):
    ds = named_object(syntax=pydicom.uid.JPEG2000Lossless)
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 60])
    assert keep(ds, tmp_path, pseudonyms).reason == "pixels that cannot be looked at"


def test_text_in_the_last_frame_is_seen():
    frames = np.stack([cells_of(picture((512, 480)))] * 3 + [with_text("QUISLING^WILHELMINA")])
    assert quarantined(named_object(cells=frames)) in (READ, SHAPED)


def test_of_a_long_loop_only_the_frames_that_are_looked_at_are_decoded():
    frames = np.stack([cells_of(picture((512, 480)))] * 6 + [with_text("QUISLING^WILHELMINA")])
    ds = named_object(cells=frames, syntax=pydicom.uid.JPEGLSLossless)
    coded = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=7))
    for number in (1, 2, 4, 5):  # which no decoder could read
        coded[number] = coded[number][:40] + b"\0" * 40
    ds.PixelData = pydicom.encaps.encapsulate(coded)
    assert pixel_reason(ds) in (READ, SHAPED)
    coded[6] = coded[0]
    ds.PixelData = pydicom.encaps.encapsulate(coded)
    assert pixel_reason(ds) is None


def touching(*pieces: str) -> np.ndarray:
    """A picture with text of which the letters of a piece touch each other."""
    layer = Image.new("L", (480, 512))
    draw, font, left = ImageDraw.Draw(layer), ImageFont.load_default(size=24), 20.0
    for piece in pieces:
        for letter in piece:
            draw.text((left, 30), letter, fill=255, font=font)
            left += draw.textlength(letter, font=font) - 2
        left += 4
    ink = np.asarray(layer) / 255
    return cells_of(picture((512, 480)) * 0.6 * (1 - ink) + ink)


@pytest.mark.skipif(not tesseract.installed(), reason="tesseract is not installed")
def test_tesseract_reads_what_no_shape_gives_away_and_neither_markers_nor_anatomy():
    name = touching("KA", "RL")
    assert lines_of_text(name) == 0
    assert text_in(name) == text_in(np.rot90(name)) == text_in(np.rot90(name, 3)) == READ
    assert text_in(with_text("SMITH")) == READ
    assert text_in(with_text("L AP")) is None and text_in(with_text("")) is None


def test_without_tesseract_or_with_one_that_fails_the_shape_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shaped, name = with_text("QUISLING^WILHELMINA", size=16), touching("KA", "RL")
    monkeypatch.setattr(tesseract, "LONGEST_S", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (text_in(shaped), text_in(name)) == (SHAPED, None)
    for script in ("exit 1", "echo words; echo that are no table", "exec /bin/sleep 60"):
        (tmp_path / "tesseract").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "tesseract").chmod(0o755)
        assert (text_in(shaped), text_in(name)) == (SHAPED, None)


def test_few_phantoms_of_fedmeds_own_are_taken_for_text(tmp_path: Path):
    make_phantoms(tmp_path / "phantoms", "cxr", sites=1, patients=30, seed=7)
    files = sorted((tmp_path / "phantoms").rglob("*.dcm"))
    pictures = [next(iter(stored_frames(open_dicom(file)))) for file in files]
    assert len(pictures) > 78 and sum(lines_of_text(each) > 0 for each in pictures) == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real X-rays are not here")
def test_few_real_chest_x_rays_show_text_and_most_of_these_say_portable():
    with (SHARED / "cxr" / "dev" / "metadata.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["hospital"] == "nih_cc"]
    flagged = sum(lines_of_text(np.asarray(Image.open(SHARED / "cxr" / row["path"]).convert("L"))) > 0 for row in rows)
    assert 0.02 < flagged / len(rows) < 0.07
