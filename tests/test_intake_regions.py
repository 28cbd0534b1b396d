"""Segmentations and structure sets of an archive become the masks of the series that they refer to."""

import copy
import csv
from dataclasses import replace
from itertools import chain
from pathlib import Path

import highdicom
import numpy as np
import pytest
from dicom_files import item_of
from image_sets import REAL
from phantom_series import Acquisition, phantom_body, slice_objects
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import RTStructureSetStorage, generate_uid

from fedmed.cli.intake import check_data
from fedmed.config import TaskConfig
from fedmed.errors import DataError
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.volumes import read_mask_volume, read_volume
from fedmed.imaging.volumes.volume import FLIP_XY
from fedmed.intake.check import check, here
from fedmed.intake.importing import Imported, Rules, import_images
from fedmed.intake.kinds.dicom import take_in
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import make_keys

SCAN = Acquisition(shape=(6, 20, 24), modality="CT")
BODY, LESION = phantom_body(SCAN.shape, seed=3)


@pytest.fixture
def pseudonyms(tmp_path: Path) -> Pseudonyms:
    return Pseudonyms(keys=make_keys(tmp_path / "keys"))


def scan(number: int) -> list[Dataset]:
    """The slices of a patient's CT, in a room of its own."""
    objects = slice_objects(np.roll(BODY, number, axis=1), replace(SCAN, seed=number))
    frame, study, series = generate_uid(), generate_uid(), generate_uid()
    for ds in objects:
        ds.PatientID, ds.PatientName, ds.AccessionNumber = f"MRN {number}", f"Doe^{number}", f"ACC{number}"
        ds.FrameOfReferenceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = frame, study, series
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.BodyPartExamined = "CHEST"
    return objects


def segmentation(objects: list[Dataset], masks: np.ndarray) -> Dataset:
    """Made by highdicom from some slices and masks (D, H, W)."""
    described = highdicom.seg.SegmentDescription(1, "lesion", codes.SCT.Tissue, codes.SCT.Tissue, "MANUAL")
    return highdicom.seg.Segmentation(
        source_images=objects, pixel_array=masks, segmentation_type="BINARY", segment_descriptions=[described],
        series_instance_uid=generate_uid(), series_number=2, sop_instance_uid=generate_uid(), instance_number=1,
        manufacturer="fedmed", manufacturer_model_name="tests", software_versions="1", device_serial_number="1",
    )  # fmt: skip


def structure_set(objects: list[Dataset], depth: int) -> Dataset:
    """A square in one slice."""
    first = objects[0]
    corners = np.array([[depth, row, column, 1] for row, column in ((4, 5), (4, 11), (9, 11), (9, 5))])
    points = (corners - [0, 0.5, 0.5, 0]) @ (FLIP_XY @ SCAN.affine).T
    contour = item_of(
        ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4,
        ContourData=[f"{value:.6f}" for value in points[:, :3].ravel()],
    )  # fmt: skip
    series = item_of(SeriesInstanceUID=first.SeriesInstanceUID)
    ds = item_of(
        SOPClassUID=RTStructureSetStorage, SOPInstanceUID=generate_uid(), Modality="RTSTRUCT",
        PatientID=first.PatientID, PatientName=first.PatientName, StudyInstanceUID=first.StudyInstanceUID,
        SeriesInstanceUID=generate_uid(),
        ReferencedFrameOfReferenceSequence=[
            item_of(
                FrameOfReferenceUID=first.FrameOfReferenceUID,
                RTReferencedStudySequence=[item_of(RTReferencedSeriesSequence=[series])],
            )
        ],
        StructureSetROISequence=[
            item_of(ROINumber=1, ROIName="lesion", ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID)
        ],
        ROIContourSequence=[item_of(ReferencedROINumber=1, ContourSequence=[contour])],
    )  # fmt: skip
    ds.file_meta = first.file_meta.__class__()
    ds.file_meta.TransferSyntaxUID = first.file_meta.TransferSyntaxUID
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    return ds


def imported(folder: Path, objects: list[Dataset], pseudonyms: Pseudonyms) -> Imported:
    """Of an export that holds these objects, into `folder`/out."""
    (folder / "export").mkdir()
    for number, ds in enumerate(objects):
        ds.save_as(folder / "export" / f"{number}.dcm", enforce_file_format=True)
    take_in(folder / "export", folder / "out", pseudonyms)
    return import_images("dicom", folder / "out", folder / "out", Rules(pseudonyms=pseudonyms))


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "out" / "manifest.csv").open(newline="") as file:
        return {row["patient_id"]: row for row in csv.DictReader(file)}


def test_regions_that_overlap_are_a_warning_until_the_task_says_which_it_takes(tmp_path, pseudonyms, monkeypatch):
    monkeypatch.setattr("fedmed.intake.check.apart", here)
    scans = [scan(number) for number in range(2)]
    outlined = [structure_set(objects, depth=3) for objects in scans]
    for ds in outlined:
        body, contours = copy.deepcopy(ds.StructureSetROISequence[0]), copy.deepcopy(ds.ROIContourSequence[0])
        body.ROINumber, body.ROIName, contours.ReferencedROINumber = 2, "BODY", 2
        ds.StructureSetROISequence.append(body)
        ds.ROIContourSequence.append(contours)
    imported(tmp_path, [*chain(*scans), *outlined], pseudonyms)

    def masks(*labels: str) -> list[tuple[str, str]]:
        facts = check(tmp_path / "out" / "manifest.csv", labels=labels)
        return [(each["state"], each["said"]) for each in facts["findings"] if each["what"] == "masks"]

    assert masks() == [("warn", "2 masks whose regions overlap")]
    assert masks("lesion") == [("pass", "each fits its image, and none is empty")]
    assert masks("lesion", "BODY") == [("fail", "2 masks: regions overlap, and a voxel can have one class only")]
    assert masks("heart") == [("fail", "2 masks: no region for class 1")]


def test_a_series_has_the_mask_that_refers_to_it_and_a_training_reads_it(tmp_path, pseudonyms, monkeypatch, capsys):
    monkeypatch.setattr("fedmed.intake.check.apart", here)
    scans = [scan(number) for number in range(4)]
    by_series = segmentation(scans[0], LESION)
    depth = int(LESION.sum(axis=(1, 2)).argmax())
    single = segmentation(scans[1][depth : depth + 1], LESION[depth : depth + 1])  # a frame, no word of its series
    del single.ReferencedSeriesSequence
    outlined = structure_set(scans[2], depth=3)
    report = imported(tmp_path, [*chain(*scans), by_series, single, outlined], pseudonyms)
    assert (report.images, report.masks) == (3, 3) and report.unmatched == {"image without mask": 1}
    square = np.zeros(SCAN.shape, np.int64)
    square[3, 4:9, 5:11] = 1
    alone = np.where(np.arange(6)[:, None, None] == depth, LESION, 0)
    for number, expected in enumerate((LESION, alone, square)):
        row = rows(tmp_path)[pseudonyms.patient(f"MRN {number}")]
        image = read_volume(tmp_path / "out" / row["image"])
        assert (read_mask_volume(tmp_path / "out" / row["mask"], image, ("lesion",)) == expected).all()
    task = TaskConfig(kind="segmentation", labels=("lesion",))
    assert len(read_manifest(tmp_path / "out" / "manifest.csv", task).rows) == 3
    assert check_data(tmp_path / "out", labels=(), html=None, as_json=False)
    assert "masks: each fits its image" in capsys.readouterr().out
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert not any(word in content for word in (b"MRN", b"Doe", str(scans[0][0].SeriesInstanceUID).encode()))


def test_masks_that_fit_no_series_or_one_that_has_another_are_told(tmp_path, pseudonyms):
    scans = [scan(number) for number in range(3)]
    gone, stranger = segmentation(scan(8), LESION), copy.deepcopy(segmentation(scans[1], LESION))
    stranger.PatientID = "MRN 2"  # of which highdicom keeps the very element of the slices
    both = [segmentation(scans[0], LESION), structure_set(scans[0], depth=2)]
    report = imported(tmp_path, [*chain(*scans), *both, gone, stranger], pseudonyms)
    assert report.unmatched == {"mask without image": 2, "one of several masks of a series, or of several series": 2}
    assert report.images == 3 and "mask" not in next(iter(rows(tmp_path).values()))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")
def test_real_masks_without_their_image_and_of_a_projection_are_told(tmp_path, pseudonyms):
    files = REAL / "dicom" / "dev" / "files"
    names = ("dcmqi/seg.dcm", "hd/seg_image_ct_binary.dcm", "hd/seg_image_cr_binary.dcm", "rtutils/rt.dcm")
    (tmp_path / "export").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "export" / f"{number}.dcm").write_bytes((files / name).read_bytes())
    take_in(tmp_path / "export", tmp_path / "out", pseudonyms)
    with pytest.raises(DataError, match="nothing of") as caught:
        import_images("dicom", tmp_path / "out", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    assert "3 × mask without image" in str(caught.value) and "1 × mask of a projection" in str(caught.value)
