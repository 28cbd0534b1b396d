"""Enhanced multi-frame objects become volumes by the places of their frames."""

from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pytest
from phantom_series import Acquisition, enhanced_object, phantom_body, slice_objects
from pydicom.dataset import Dataset
from pydicom.uid import UltrasoundMultiFrameImageStorage
from volumes_of import volumes_in

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes import read_volume
from fedmed.imaging.volumes.series import read_series
from fedmed.imaging.volumes.volume import FLIP_XY

PLAIN = Acquisition()
OBLIQUE = replace(PLAIN, along_row=(0.8, 0.6, 0.0), along_column=(-0.36, 0.48, 0.8))
BODY, _ = phantom_body(PLAIN.shape)


def test_enhanced_frames_are_placed_by_position_and_never_by_their_index(tmp_path: Path):
    order = np.random.default_rng(4).permutation(len(BODY)).tolist()
    enhanced_object(BODY, OBLIQUE, order).save_as(tmp_path / "object", enforce_file_format=True)
    volume = read_volume(tmp_path / "object")
    assert (volume.values == BODY).all() and volume.modality == "CT"
    np.testing.assert_allclose(volume.affine, OBLIQUE.affine, atol=1e-5)
    assert (read_series(tmp_path).values == BODY).all()  # a folder with that one object
    theirs = highdicom.imread(tmp_path / "object").get_volume()
    if theirs.affine[:3, 0] @ (FLIP_XY @ volume.affine)[:3, 0] < 0:
        theirs = theirs.flip_spatial(0)
    np.testing.assert_allclose(FLIP_XY @ volume.affine, theirs.affine, atol=1e-3)
    np.testing.assert_allclose(volume.values, theirs.array)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([0, 1, 3, 4], "one slice is missing"),
        ([0, 1, 2, 0, 1, 2], "6 slices at 3 positions"),
        ([5, 5, 5], "a cine, not a volume"),
        ([2], "a single slice"),
    ],
)
def test_refuses_enhanced_objects_that_are_no_volume(tmp_path: Path, frames: list[int], reason: str):
    enhanced_object(BODY, PLAIN, frames).save_as(tmp_path / "object", enforce_file_format=True)
    with pytest.raises(UnreadableImage, match=reason):
        read_volume(tmp_path / "object")


def test_refuses_a_cine_a_single_slice_and_an_object_without_functional_groups(tmp_path: Path):
    ds = enhanced_object(BODY, PLAIN)
    del ds.PerFrameFunctionalGroupsSequence
    cine = enhanced_object(BODY, PLAIN)
    cine.SOPClassUID = UltrasoundMultiFrameImageStorage
    single = slice_objects(BODY, PLAIN)[0]
    for one, reason in ((single, "a single slice"), (ds, "without a functional group"), (cine, "frames of a cine")):
        one.save_as(tmp_path / "object", enforce_file_format=True, overwrite=True)
        with pytest.raises(UnreadableImage, match=reason):
            read_volume(tmp_path / "object")
    with pytest.raises(UnreadableImage, match="no such file"):
        read_volume(tmp_path / "missing")


def test_frames_at_two_times_are_two_volumes_told_apart_by_their_index_in_time(tmp_path: Path):
    ds = enhanced_object(BODY, PLAIN, [*range(12), *range(12)])
    for number, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        group.FrameContentSequence[0].TemporalPositionIndex = 1 + number // 12
    ds.save_as(tmp_path / "object", enforce_file_format=True)
    with pytest.raises(UnreadableImage, match=r"^two volumes, not one: they differ in time point$"):
        read_volume(tmp_path / "object")
    assert [(volume.values == BODY).all() for volume in volumes_in(tmp_path)] == [True, True]


def test_frames_have_their_own_rescale(tmp_path: Path):
    ds = enhanced_object(BODY, PLAIN)
    shared = ds.SharedFunctionalGroupsSequence[0]
    del shared.PixelValueTransformationSequence
    for number, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        rescale = Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = number + 1, -1024, "HU"
        group.PixelValueTransformationSequence = [rescale]
    ds.save_as(tmp_path / "object", enforce_file_format=True)
    volume = read_volume(tmp_path / "object")
    assert (volume.values == (BODY + 1024) * np.arange(1, 13)[:, None, None] - 1024).all() and volume.units == "HU"


def test_a_localizer_among_the_frames_is_left_out(tmp_path: Path):
    ds = enhanced_object(BODY, PLAIN, [*range(12), 3])
    kind = Dataset()
    kind.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    ds.PerFrameFunctionalGroupsSequence[12].CTImageFrameTypeSequence = [kind]
    ds.save_as(tmp_path / "object", enforce_file_format=True)
    assert (read_volume(tmp_path / "object").values == BODY).all()
