"""Folders of DICOM files become the one volume that they hold, or say why they do not."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from phantom_series import (
    Acquisition,
    phantom_body,
    slice_objects,
    write_series,
)
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import SecondaryCaptureImageStorage
from volumes_of import volumes_in

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes.series import read_series
from fedmed.imaging.volumes.slices import Refusal
from fedmed.imaging.volumes.volume import FLIP_XY, Volume

PLAIN = Acquisition()
ROLL = (0.8, 0.6, 0.0), (-0.36, 0.48, 0.8)  # perpendicular, along no axis
BODY, LESION = phantom_body(PLAIN.shape)


def save(folder: Path, objects: list[Dataset]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, ds in enumerate(objects):
        ds.save_as(folder / f"{number:04d}", enforce_file_format=True)
    return folder


def slices(**changes: object) -> list[Dataset]:
    return slice_objects(BODY, replace(PLAIN, **changes))


def again(objects: list[Dataset], **attributes: object) -> list[Dataset]:
    """The same slices a second time, as other instances with other attributes."""
    copies = []
    for number, ds in enumerate(objects):
        copy = deepcopy(ds)
        copy.SOPInstanceUID = f"{ds.SOPInstanceUID}.{number}.{len(str(attributes))}"
        for keyword, value in attributes.items():
            setattr(copy, keyword, value)
        copies.append(copy)
    return copies


def assert_agrees_with_highdicom(volume: Volume, folder: Path) -> None:
    datasets = [ds for ds in map(pydicom.dcmread, sorted(folder.iterdir())) if "PixelData" in ds]
    theirs = highdicom.get_volume_from_series(datasets, apply_real_world_transform=False)
    ours = np.asarray(FLIP_XY @ volume.affine)
    if theirs.affine[:3, 0] @ ours[:3, 0] < 0:
        theirs = theirs.flip_spatial(0)
    np.testing.assert_allclose(ours, theirs.affine, atol=1e-3)
    np.testing.assert_allclose(volume.values, theirs.array, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("directions", [PLAIN, replace(PLAIN, along_row=ROLL[0], along_column=ROLL[1])])
def test_slices_of_any_name_number_and_orientation_are_sorted_by_position(
    tmp_path: Path, modality: str, directions: Acquisition
):
    acquisition = replace(directions, modality=modality)
    values = BODY if modality == "CT" else np.clip(BODY, 0, None)
    write_series(tmp_path, values, acquisition)
    volume = read_series(tmp_path)
    step = values.max(axis=(1, 2), keepdims=True) / 32000 if modality == "PT" else 0  # each slice has its own slope
    assert (np.abs(volume.values - values) <= 0.51 * step).all()
    np.testing.assert_allclose(volume.affine, acquisition.affine, atol=1e-5)
    np.testing.assert_allclose(volume.spacing_mm, (3.0, 1.5, 1.25), atol=1e-5)
    assert volume.modality == modality and volume.padding is None
    assert_agrees_with_highdicom(volume, tmp_path)


def test_spacing_comes_from_positions_and_not_from_what_headers_say(tmp_path: Path):
    objects = slices(thickness_mm=9.0)
    for ds in objects:
        ds.SpacingBetweenSlices = 4.5
    assert read_series(save(tmp_path, objects)).spacing_mm[0] == pytest.approx(3.0)


def test_only_a_ct_with_rescale_to_hounsfield_units_is_in_these(tmp_path: Path):
    without = slices()
    del without[2].RescaleIntercept
    for name, objects, units in (
        ("ct", slices(), "HU"),
        ("mr", slices(modality="MR"), ""),
        ("raw", without, ""),
        ("other", again(slices(), RescaleType="mgml"), ""),
    ):
        assert read_series(save(tmp_path / name, objects)).units == units, name


def test_padding_is_marked_and_takes_the_lowest_value_of_the_image(tmp_path: Path):
    objects = slices()
    for ds in objects:
        ds.PixelPaddingValue = -2000
        cells = ds.pixel_array.copy()
        cells[:2] = -2000
        ds.PixelData = cells.tobytes()
    volume = read_series(save(tmp_path, objects))
    assert volume.padding is not None and volume.padding[:, :2].all() and not volume.padding[:, 2:].any()
    assert volume.values.min() == volume.values[:, :2].max() == BODY.min()


def test_files_that_are_no_slices_are_passed_over(tmp_path: Path):
    objects = slices()
    scout = again(objects[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImagePositionPatient=[0, 0, 500])
    screen = again(objects[:1], SOPClassUID=SecondaryCaptureImageStorage)
    report = Dataset()
    report.file_meta = objects[0].file_meta.copy()
    report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.3"
    derived = again(objects[:1], ImageType=["DERIVED", "SECONDARY"])
    del derived[0].ImagePositionPatient
    save(tmp_path, [*objects, *scout, *screen, report, *derived])
    (tmp_path / "README.dcm").write_text("no DICOM")
    (tmp_path / "subfolder").mkdir()
    assert (read_series(tmp_path).values == BODY).all()


def without(index: int) -> list[Dataset]:
    return [ds for number, ds in enumerate(slices()) if number != index]


def tilted() -> list[Dataset]:
    objects = slices()
    for number, ds in enumerate(objects):
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y + 0.2 * number, z]
    return objects


def slowly_tilted() -> list[Dataset]:
    objects = slices()
    for number, ds in enumerate(objects):
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y + 0.04 * number, z]  # 0.76°: below 0.1 mm from slice to slice
    return objects


def with_one_shifted_sideways() -> list[Dataset]:
    objects = slices()
    objects[6].ImagePositionPatient[0] += 0.15
    return objects


def repeated_at_other_times() -> list[Dataset]:
    objects = [*slices(), *again(slices())]
    for number, ds in enumerate(objects):
        ds.ContentTime = f"12{number:04d}"
    return objects


def drifting() -> list[Dataset]:
    objects = slices()
    for number, ds in enumerate(objects):
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y, z + 0.09 * max(0, number - 6)]
    return objects


def jittered() -> list[Dataset]:
    objects = slices()
    objects[4].ImagePositionPatient[2] += 1.1
    return objects


def of_two_sizes() -> list[Dataset]:
    objects = slices()
    objects[-1].Rows -= 4
    objects[-1].PixelData = objects[-1].PixelData[: objects[-1].Rows * objects[-1].Columns * 2]
    return objects


def of_two_spacings() -> list[Dataset]:
    objects = slices()
    objects[-1].PixelSpacing = [1.5, 1.3]
    return objects


def unplaced() -> list[Dataset]:
    objects = slices()
    del objects[-1].ImagePositionPatient
    return objects


def squashed() -> list[Dataset]:
    objects = slices()
    for ds in objects:
        ds.ImageOrientationPatient = [1, 0, 0, 1, 0, 0]
    return objects


def truncated() -> list[Dataset]:
    objects = slices()
    objects[3].PixelData = objects[3].PixelData[:100]
    return objects


def cine() -> list[Dataset]:
    objects = slices()
    for ds in objects:
        ds.ImagePositionPatient = objects[0].ImagePositionPatient
    return objects


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        (lambda: without(5), "one slice is missing"),
        (lambda: [ds for number, ds in enumerate(slices()) if number not in (4, 5, 8)], "three slices are missing"),
        (jittered, "slices are unevenly spaced"),
        (drifting, "slices are unevenly spaced"),
        (tilted, "gantry tilt"),
        (slowly_tilted, "gantry tilt"),
        (with_one_shifted_sideways, "slices are shifted sideways"),
        (repeated_at_other_times, "24 slices at 12 positions"),
        (of_two_sizes, "slices of different sizes"),
        (of_two_spacings, "slices of different pixel spacing"),
        (unplaced, "slices that do not say where they lie"),
        (squashed, "slices that do not say where they lie"),
        (truncated, "a damaged DICOM file among the slices"),
        (lambda: slices()[1:] + again(slices()[:1], ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "^mosaics"),
        (cine, "all slices lie at one position: a cine, not a volume"),
        (lambda: slices()[:1], "a single slice"),
        (lambda: [*slices(), *again(slices())], "24 slices at 12 positions, and nothing in their headers tells"),
        (lambda: [*slices(), *again(slices(seed=3))], "two volumes, not one: they differ in their series"),
        (list, "no slices"),
    ],
)
def test_refuses_what_is_no_regular_volume_with_its_reason(tmp_path: Path, objects, reason: str):
    with pytest.raises(UnreadableImage, match=reason) as refusal:
        read_series(save(tmp_path, objects()))
    text = str(refusal.value)
    assert "2.25." not in text and str(tmp_path) not in text and "P-0" not in text and "\n" not in text


@pytest.mark.parametrize(
    ("attributes", "difference"),
    [
        ({"EchoTime": 25.0}, "echo time"),
        ({"TemporalPositionIdentifier": 2}, "time point"),
        ({"AcquisitionNumber": 2}, "acquisition"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "P", "NORM"]}, "image type"),
        ({"DiffusionBValue": 1000.0}, "b-value"),
    ],
)
def test_repeated_positions_are_split_by_what_tells_them_apart(tmp_path: Path, attributes, difference: str):
    first = slices(modality="MR")
    second = again(first, **attributes)
    for ds in second:
        ds.PixelData = (ds.pixel_array // 2).tobytes()
    for number, ds in enumerate([*first, *second]):
        ds.ContentTime = f"12{number:04d}"  # differs everywhere, so it tells nothing apart
    save(tmp_path, [*second, *first])
    with pytest.raises(UnreadableImage, match=f"^two volumes, not one: they differ in {difference}$"):
        read_series(tmp_path)
    found = list(volumes_in(tmp_path))
    assert [volume.shape for volume in found] == [PLAIN.shape] * 2
    brightest = sorted(int(volume.values.max()) for volume in found)
    assert brightest[0] == brightest[1] // 2


def test_two_echoes_of_magnitude_and_phase_are_four_volumes(tmp_path: Path):
    first = slices(modality="MR")
    echoes = [*first, *again(first, EchoTime=25.0)]
    phase = again(echoes, ImageType=["ORIGINAL", "PRIMARY", "P"])
    with pytest.raises(UnreadableImage, match="four volumes, not one: they differ in echo time and image type"):
        read_series(save(tmp_path, [*echoes, *phase]))


def test_one_whole_echo_is_not_taken_for_all_when_the_other_lacks_a_slice(tmp_path: Path):
    first = slices(modality="MR")
    second = again(first, EchoTime=25.0)
    save(tmp_path, [*first, *second[:5], *second[6:]])
    with pytest.raises(UnreadableImage, match="two volumes"):
        read_series(tmp_path)
    whole, broken = volumes_in(tmp_path)
    assert isinstance(whole, Volume) and broken == Refusal(reason="one slice is missing", slices=11)


def test_slices_without_file_meta_information_are_not_passed_over(tmp_path: Path):
    for number, ds in enumerate(slices()):
        if number < 5:
            ds.file_meta, ds.preamble = FileMetaDataset(), None
            ds.save_as(tmp_path / f"{number}", implicit_vr=True, little_endian=True, enforce_file_format=False)
        else:
            ds.save_as(tmp_path / f"{number}", enforce_file_format=True)
    assert (read_series(tmp_path).values == BODY).all()


def test_copies_of_a_slice_count_once(tmp_path: Path):
    objects = slices()
    save(tmp_path, [*objects, *deepcopy(objects[2:5])])
    assert (read_series(tmp_path).values == BODY).all()
    for ds in objects:
        ds.SOPInstanceUID = objects[0].SOPInstanceUID  # as anonymizers do that keep no UIDs apart
    assert (read_series(save(tmp_path / "one UID", objects)).values == BODY).all()


@pytest.mark.parametrize(("broken", "reason"), [(lambda: without(5), "one slice is missing"), (tilted, "gantry tilt")])
def test_a_small_stack_across_is_not_taken_for_the_broken_one_beside_it(tmp_path: Path, broken, reason: str):
    coronal = replace(PLAIN, shape=(5, 24, 20), along_row=(1.0, 0.0, 0.0), along_column=(0.0, 0.0, -1.0))
    reformat = again(slice_objects(BODY[:5], coronal), ImageType=["DERIVED", "SECONDARY", "REFORMATTED"])
    assert read_series(save(tmp_path / "alone", reformat)).shape == coronal.shape
    with pytest.raises(UnreadableImage, match=reason):
        read_series(save(tmp_path / "both", [*broken(), *reformat]))


def test_a_lone_slice_across_does_not_stand_against_the_volume(tmp_path: Path):
    across = again(slices()[:1], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    assert (read_series(save(tmp_path, [*slices(), *across])).values == BODY).all()
