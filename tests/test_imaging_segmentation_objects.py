"""Targets from DICOM SEG, RT structure sets, NIfTI and series lie on the voxels that they were drawn on."""

from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from highdicom.seg import Segmentation, SegmentDescription
from hypothesis import given, settings
from hypothesis import strategies as st
from phantom_series import Acquisition, phantom_body, slice_objects
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RTStructureSetStorage, generate_uid

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes import read_mask_volume
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.series import read_series
from fedmed.imaging.volumes.structures import even_odd
from fedmed.imaging.volumes.volume import FLIP_XY, Volume, canonical

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "dicom" / "dev" / "files"
OBLIQUE = Acquisition(along_row=(0.8, 0.6, 0.0), along_column=(-0.36, 0.48, 0.8), shape=(9, 23, 19))
BODY, LESION = phantom_body(OBLIQUE.shape, seed=3)
ORGAN = np.zeros(OBLIQUE.shape, np.uint8)
ORGAN[1:4, 2:6, 3:9] = 1


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Dataset], Volume]:
    """The slices of a phantom, and the volume that they are read as."""
    folder = tmp_path_factory.mktemp("series")
    objects = slice_objects(BODY, OBLIQUE)
    for number, ds in enumerate(objects):
        ds.save_as(folder / f"{number}", enforce_file_format=True)
    return objects, read_series(folder)


def segment(number: int, label: str) -> SegmentDescription:
    return SegmentDescription(number, label, codes.SCT.Tissue, codes.SCT.Tissue, "MANUAL")


def segmentation(objects: list[Dataset], masks: np.ndarray, kind: str = "BINARY", **options: object) -> Segmentation:
    """A DICOM SEG made by highdicom; masks are (D, H, W, segments), or (D, H, W) for label maps."""
    labels = ["lesion", "organ"][: masks.shape[-1] if masks.ndim == 4 else int(masks.max())]
    return Segmentation(
        source_images=objects,
        pixel_array=masks,
        segmentation_type=kind,
        segment_descriptions=[segment(number, label) for number, label in enumerate(labels, start=1)],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="fedmed",
        manufacturer_model_name="tests",
        software_versions="1",
        device_serial_number="1",
        **options,
    )


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_segmentation_lies_on_the_voxels_that_were_segmented(tmp_path: Path, scanned, kind: str, turned: bool):
    objects, volume = scanned
    expected = LESION + 2 * ORGAN.astype(np.int64)
    masks = expected.astype(np.uint8) if kind == "LABELMAP" else np.stack([LESION, ORGAN], -1)
    shuffled = np.random.default_rng(1).permutation(len(objects))
    made = segmentation(
        [objects[i] for i in shuffled], masks[shuffled].astype(float if kind[0] == "F" else np.uint8), kind
    )
    made.save_as(tmp_path / "seg")
    assert made.NumberOfFrames < masks[..., 0].size  # frames without a voxel were left out
    image = canonical(volume) if turned else volume
    mask = read_mask_volume(tmp_path / "seg", image)
    assert mask.dtype == np.int64
    truth = canonical(replace(volume, values=expected)).values if turned else expected
    assert (mask == truth).all() and set(np.unique(mask)) == {0, 1, 2}
    assert (read_mask_volume(tmp_path, image, ("ORGAN ", "1")) == np.array([0, 2, 1])[truth]).all()
    assert (read_mask_volume(tmp_path / "seg", image, ("organ",)) == (truth == 2)).all()


def test_half_of_the_largest_fraction_belongs_to_a_segment(tmp_path: Path, scanned):
    objects, volume = scanned
    fractions = np.linspace(0, 1, BODY.size).reshape(BODY.shape)[..., None]
    made = segmentation(objects, fractions, "FRACTIONAL", max_fractional_value=200)
    made.save_as(tmp_path / "seg")
    stored = np.rint(fractions[..., 0] * 200)
    assert (read_mask_volume(tmp_path / "seg", volume) == (stored >= 100)).all()


def test_a_compressed_segmentation_is_read(tmp_path: Path, scanned):
    objects, volume = scanned
    segmentation(objects, LESION[..., None].astype(float), "FRACTIONAL", transfer_syntax_uid=JPEGLSLossless).save_as(
        tmp_path / "seg"
    )
    assert (read_mask_volume(tmp_path / "seg", volume) == LESION).all()


def test_refuses_a_segmentation_that_does_not_fit_its_image(tmp_path: Path, scanned):
    objects, volume = scanned
    segmentation(objects, np.stack([LESION, ORGAN], -1)).save_as(tmp_path / "seg")
    finer, shifted = volume.affine @ np.diag([1, 0.5, 0.5, 1]), volume.affine.copy()
    shifted[:3, 3] += shifted[:3, 2] * 0.4
    turned = volume.affine.copy()
    turned[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ turned[:3, :3]
    for change, reason in (
        ({"frame_of_reference": "1.2.3"}, "another frame of reference"),
        ({"affine": finer}, "another orientation, spacing or grid"),
        ({"affine": shifted}, "another orientation, spacing or grid"),
        ({"affine": turned}, "another orientation, spacing or grid"),
        ({"values": volume.values[:3]}, "reaches beyond its image"),
    ):
        with pytest.raises(UnreadableImage, match=reason) as refusal:
            read_mask_volume(tmp_path / "seg", replace(volume, **change))
        assert "1.2.3" not in str(refusal.value) and "2.25" not in str(refusal.value)
    for labels, reason in ((("liver",), "no region for class 1"), (("lesion", "1"), "classes 1 and 2 are one region")):
        with pytest.raises(UnreadableImage, match=reason):
            read_mask_volume(tmp_path / "seg", volume, labels)
    assert (read_mask_volume(tmp_path / "seg", replace(volume, frame_of_reference="")) != 0).any()


def test_refuses_segments_that_overlap_unless_one_is_asked_for(tmp_path: Path, scanned):
    objects, volume = scanned
    both = np.stack([LESION, LESION | ORGAN], -1)
    segmentation(objects, both).save_as(tmp_path / "seg")
    with pytest.raises(UnreadableImage, match="regions overlap"):
        read_mask_volume(tmp_path / "seg", volume)
    assert (read_mask_volume(tmp_path / "seg", volume, ("organ",)) == both[..., 1]).all()


def structure_set(rois: dict[str, list[np.ndarray]], frame_of_reference: str, kind: str = "CLOSED_PLANAR") -> Dataset:
    """Contours are (P, 3) in LPS mm."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = RTStructureSetStorage, generate_uid(), "RTSTRUCT"
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=7):
        roi, shapes = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, frame_of_reference
        shapes.ReferencedROINumber, shapes.ContourSequence = number, []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{value:.6f}" for value in points.ravel()]
            shapes.ContourSequence.append(contour)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(shapes)
    return ds


def outline(volume: Volume, depth: float, corners: list[tuple[float, float]]) -> np.ndarray:
    """Corners (row, column) in a slice, in LPS mm."""
    index = np.array([[depth, row, column, 1] for row, column in corners])
    return (index @ (FLIP_XY @ volume.affine).T)[:, :3]


def box(top: float, left: float, bottom: float, right: float) -> list[tuple[float, float]]:
    return [(top, left), (top, right), (bottom, right), (bottom, left)]


@pytest.mark.parametrize("turned", [False, True])
def test_contours_become_the_voxels_whose_centres_they_enclose(tmp_path: Path, scanned, turned: bool):
    _, volume = scanned
    outer, hole = box(2.5, 3.5, 9.5, 12.5), box(4.5, 5.5, 6.5, 8.5)
    rois = {
        "ring": [outline(volume, depth + 0.3, part) for depth in (2, 3, 5) for part in (outer, hole)],
        "Organ": [outline(volume, 3, box(12.4, 0.6, 14.2, 3.4))],
    }
    structure_set(rois, volume.frame_of_reference).save_as(tmp_path / "rt", enforce_file_format=True)
    expected = np.zeros(volume.shape, np.int64)
    expected[[2, 3, 5], 3:10, 4:13] = 1
    expected[[2, 3, 5], 5:7, 6:9] = 0
    expected[3, 13:15, 1:4] = 2
    image = canonical(volume) if turned else volume
    truth = canonical(replace(volume, values=expected)).values if turned else expected
    assert (read_mask_volume(tmp_path / "rt", image) == truth).all()
    assert (read_mask_volume(tmp_path, image, ("organ",)) == (truth == 2)).all()
    assert (read_mask_volume(tmp_path, image, ("8", "ring")) == np.array([0, 2, 1])[truth]).all()


def test_of_two_planes_at_one_slice_the_nearer_counts(tmp_path: Path, scanned):
    _, volume = scanned
    near, far = box(2.5, 2.5, 6.5, 6.5), box(2.5, 2.5, 8.5, 8.5)
    rois = {"a": [outline(volume, 3.4, far), outline(volume, 2.9, near)]}
    structure_set(rois, "").save_as(tmp_path / "rt", enforce_file_format=True)
    mask = read_mask_volume(tmp_path / "rt", volume)
    assert mask.sum() == mask[3, 3:7, 3:7].sum() == 16


def test_refuses_contours_that_do_not_fit_the_image(tmp_path: Path, scanned):
    _, volume = scanned
    square = box(2, 2, 6, 6)
    upright = outline(volume, 0, square) + np.array([[0, 0, 0], [0, 0, 9], [0, 0, 9], [0, 0, 0]])
    for contours, uid, reason in (
        ([outline(volume, 2, square)], "1.2.3", "another frame of reference"),
        ([outline(volume, 9.2, square)], "", "outside of the image"),
        ([upright], "", "not parallel"),
        ([outline(volume, depth, square) for depth in (1, 3, 5, 7)], "", "further apart than the slices"),
    ):
        structure_set({"a": contours}, uid).save_as(tmp_path / "rt", enforce_file_format=True, overwrite=True)
        with pytest.raises(UnreadableImage, match=reason):
            read_mask_volume(tmp_path / "rt", volume)
    structure_set({"a": [outline(volume, 2, square)]}, "", "POINT").save_as(tmp_path / "p", enforce_file_format=True)
    with pytest.raises(UnreadableImage, match="no closed contour for class 1"):
        read_mask_volume(tmp_path / "p", volume, ("a",))


@given(st.lists(st.tuples(st.floats(-3, 13), st.floats(-3, 13)), min_size=3, max_size=12))
@settings(max_examples=100, deadline=None)
def test_even_odd_is_the_parity_of_windings(corners: list[tuple[float, float]]):
    polygon = np.array(corners)
    inside = even_odd([polygon], (10, 11))
    for row in range(10):
        for column in range(11):
            crossed = 0  # edges that a ray to the left passes through
            for (y0, x0), (y1, x1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
                if min(y0, y1) <= row < max(y0, y1):
                    crossed += x0 + (row - y0) / (y1 - y0) * (x1 - x0) <= column
            assert inside[row, column] == crossed % 2


def test_masks_of_class_numbers_must_lie_on_the_grid_of_their_image(tmp_path: Path, scanned):
    _, volume = scanned
    classes = LESION + 2 * ORGAN.astype(np.int64)
    write_nifti(replace(volume, values=classes), tmp_path / "m.nii.gz")
    assert (read_mask_volume(tmp_path / "m.nii.gz", volume) == classes).all()
    turned = canonical(replace(volume, values=classes))  # as dcm2niix and others order axes
    write_nifti(turned, tmp_path / "turned.nii.gz")
    assert turned.affine[0, 2] * volume.affine[0, 2] < 0
    assert (read_mask_volume(tmp_path / "turned.nii.gz", volume) == classes).all()
    shifted = volume.affine.copy()
    shifted[2, 3] += 2
    for change, reason in (
        ({"values": classes[:-1]}, "the mask is 8 by 23 by 19 voxels, its image 9 by 23 by 19"),
        ({"values": classes, "affine": shifted}, "another grid"),
    ):
        write_nifti(replace(volume, **change), tmp_path / "wrong.nii.gz")
        with pytest.raises(UnreadableImage, match=reason):
            read_mask_volume(tmp_path / "wrong.nii.gz", volume)
    series = slice_objects(classes.astype(np.float32), replace(OBLIQUE, modality="MR"))
    (tmp_path / "series").mkdir()
    for number, ds in enumerate(series):
        ds.save_as(tmp_path / "series" / str(number), enforce_file_format=True)
    assert (read_mask_volume(tmp_path / "series", volume) == classes).all()


def image_of(path: Path, frame_of_reference: str, depth: int = 12) -> Volume:
    """A volume on the grid of a real segmentation, as highdicom places it, widened to `depth` slices."""
    grid = highdicom.seg.segread(path).get_volume(combine_segments=False, rescale_fractional=False)
    shape = (max(depth, grid.spatial_shape[0]), *grid.spatial_shape[1:3])
    return Volume(
        values=np.zeros(shape, np.float32), affine=FLIP_XY @ grid.affine, frame_of_reference=frame_of_reference
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize(
    ("name", "segments"),
    [
        ("dcmqi/liver.dcm", 1),
        ("dcmqi/seg.dcm", 1),
        ("pydata/liver_j2k.dcm", 1),
        ("hd/seg_image_ct_binary.dcm", 1),
        ("hd/seg_image_ct_binary_fractional.dcm", 1),
        ("hd/seg_image_ct_true_fractional.dcm", 1),
        ("dcmqi/partial_overlaps.dcm", 5),
    ],
)
def test_real_segmentations_agree_with_highdicom(name: str, segments: int):
    path = DATA / name
    volume = image_of(path, str(pydicom.dcmread(path).FrameOfReferenceUID), depth=0)
    theirs = highdicom.seg.segread(path).get_volume(combine_segments=False, rescale_fractional=True).array
    for number in range(1, segments + 1):
        mask = read_mask_volume(path, volume, (str(number),))
        assert mask.any() and (mask == (theirs[..., number - 1] >= 0.5)).all()


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dcmqi/partial_overlaps.dcm", "regions overlap"),
        ("hd/seg_image_cr_binary.dcm", "do not say where they lie"),
        ("hd/seg_image_sm_dots.dcm", "do not say where they lie"),
        ("pydata/liver_rle.dcm", "cannot be decoded"),
        ("rtutils/rt.dcm", "outside of the image"),
    ],
)
def test_real_objects_that_make_no_mask_are_refused(name: str, reason: str):
    liver = image_of(DATA / "dcmqi/liver.dcm", "")
    with pytest.raises(UnreadableImage, match=reason):
        read_mask_volume(DATA / name, liver)
