"""Heat maps and masks lie on the image as it was given: exactly, in two dimensions and in three."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_files import image_object, written
from hypothesis import given
from hypothesis import strategies as st
from kept_runs import FINDING, LUNG, affine_of, colourfulness, grey_png, kept_run, pixels, results_of

from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.reading import read_mask
from fedmed.imaging.resize import letterbox
from fedmed.imaging.volumes.nifti import read_nifti, write_nifti
from fedmed.imaging.volumes.volume import Volume
from fedmed.training.evaluate import likeliest_alone
from fedmed.training.predict.batch import Drawn, Prediction, classes_of, likelihoods, predict_images
from fedmed.training.predict.geometry import Frames, without_letterbox
from fedmed.training.predict.inputs import decoder
from fedmed.training.predict.kept import load_kept
from fedmed.training.predict.pictures import LONGEST, heat_colours, heat_overlay, region_overlay

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are faster so, the more where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def process():
    with decoder("slices") as process:
        yield process


@pytest.fixture
def drawn(tmp_path: Path, process: DecodingProcess):
    """A function: what a new network says of some images, and the folder of results; see `results_of`."""

    def run(*arguments: object, **options: object) -> tuple[list[Prediction], Path]:
        folder = tmp_path / f"drawn-{len(list(tmp_path.iterdir()))}"
        return results_of(folder, process, *arguments, **options), folder

    return run


# Heat maps


@pytest.fixture
def corner(tmp_path: Path) -> Path:
    """A dark image, wider than high, with its lower left corner bright."""
    values = np.full((48, 96), 10)
    values[36:, :18] = 250
    return grey_png(tmp_path / "corner.png", values)


def test_heat_lies_on_what_speaks_for_the_label(corner, drawn):
    (found,), folder = drawn("spot", FINDING, corner, heat_maps=("bright", "dark"), **{"image-size": 32})
    assert [each.what for each in found.drawn] == ["bright", "dark"]
    bright, dark = (pixels(folder / each.file) for each in found.drawn)
    assert bright.shape == dark.shape == (48, 96, 3)
    inside, outside = np.zeros((48, 96), bool), np.ones((48, 96), bool)
    inside[40:, :14], outside[32:, :22] = True, False
    assert (colourfulness(bright)[inside] > 30).all() and (colourfulness(bright)[outside] == 0).all()
    assert (colourfulness(dark)[outside] > 30).all() and (colourfulness(dark)[inside] == 0).all()
    assert np.unique(bright[outside]).tolist() == [10], "the image shows through"


@pytest.mark.parametrize(
    "data",
    [
        {"items": "volumes", "volume-size": [8, 12, 12]},
        {"items": "patches", "volume-size": [4, 5, 4]},
        {"items": "slices", "image-size": 12},
    ],
    ids=lambda data: data["items"],
)
def test_in_3d_the_heat_map_is_of_the_hottest_slice_and_says_which(tmp_path, drawn, data):
    values = np.full((7, 10, 12), 5, np.float32)
    values[4, 2:5, 6:10] = 200
    write_nifti(Volume(values=values, affine=affine_of((2.0, 1.0, 1.0))), tmp_path / "scan.nii.gz")
    network = {"name": "kept_runs:spot"}
    (found,), folder = drawn(network, FINDING, tmp_path / "scan.nii.gz", heat_maps=("bright",), **data)
    assert found.drawn == (Drawn(what="bright", file="image-0001-heat-map-bright-slice-005.png", slice=5),)
    heat = colourfulness(pixels(folder / found.drawn[0].file))
    expected = np.zeros((10, 12), bool)
    expected[2:5, 6:10] = True
    assert np.array_equal(heat > 0, expected[::-1, ::-1])  # the front up, and the patient's right on the left


def test_attention_gates_are_three_overlays(corner, drawn):
    network = {"name": "attention-unet", "width": 2}
    (found,), folder = drawn(network, LUNG, corner, heat_maps=(), **{"image-size": 32})
    assert [each.what for each in found.drawn] == ["mask", "overlay", "gate-1", "gate-2", "gate-3"]
    for each in found.drawn[1:]:
        assert each.file == f"image-0001-{each.what}.png"
        assert pixels(folder / each.file).shape == (48, 96, 3)


# Masks, in the geometry of the image


def test_a_mask_is_exactly_the_image_it_was_made_of(tmp_path, drawn):
    """Upright and lying, reduced, enlarged, and as it is."""
    for shape, size in (((96, 48), 48), ((48, 96), 48), ((24, 16), 48), ((64, 64), 64), ((64, 32), 32)):
        values = np.zeros(shape)
        values[-shape[0] // 4 :, : shape[1] // 2] = 255  # one corner, and a block that touches no edge
        values[8:16, 4:12] = 255
        image = grey_png(tmp_path / f"{shape}-{size}.png", values)
        (found,), folder = drawn("outline", LUNG, image, **{"image-size": size})
        mask, overlay = found.drawn
        assert np.array_equal(read_mask(folder / mask.file), values > 127)
        assert found.voxels == {"lung": int((values > 127).sum())}
        assert np.array_equal(colourfulness(pixels(folder / overlay.file)) > 0, values > 127)


def test_a_mask_of_pixels_that_are_not_square_lies_on_them_and_the_overlay_shows_them_as_they_are(tmp_path, drawn):
    values = np.zeros((48, 96), np.uint16)
    values[8:24, 16:64] = 4095
    image = written(image_object(values, PixelSpacing=[1.0, 0.5]), tmp_path / "image.dcm")
    (found,), folder = drawn("outline", LUNG, image, **{"image-size": 48})
    mask, overlay = found.drawn
    assert np.array_equal(read_mask(folder / mask.file), values > 0)
    assert pixels(folder / overlay.file).shape == (96, 96, 3)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(8, 40), st.integers(0, 3), st.sampled_from([0.5, 1.0, 1.6]))
def test_undoing_the_letterbox_brings_every_corner_home(height, width, size, which, aspect):
    """Whatever the shape: a gradient that rises away from one corner has its lowest value there again."""
    rise = np.add.outer(np.arange(height) / height, np.arange(width) / width).astype(np.float32) + 1
    image = np.rot90(rise, 2 * (which // 2))[:, :: 1 - 2 * (which % 2)]
    found = without_letterbox(letterbox(image[None].copy(), size, aspect), (height, width), aspect)[0]
    assert found.shape == image.shape
    assert found.argmin() == image.argmin() or found.min() == found.flat[image.argmin()]
    assert found.min() >= 1 - 1e-5, "no padding is left"


def test_maps_are_interpolated_between_the_pixels_of_the_smaller_image():
    """A ramp of 8 columns in an image of 16 by 8: twice as fine, each new centre a quarter of a column off."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (8, 8))
    found = without_letterbox(ramp, (8, 16))
    expected = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
    np.testing.assert_allclose(found, np.broadcast_to(expected, (8, 16)), atol=1e-6)


TURNS = {
    "canonical": affine_of((2.0, 1.0, 1.5)),
    "turned": affine_of((2.0, 1.0, 1.5)) @ np.array([[0, 1, 0, 0], [-1, 0, 0, 7], [0, 0, -1, 3], [0, 0, 0, 1.0]]),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    "data",
    [
        {"items": "volumes", "volume-size": [16, 16, 16]},
        {"items": "patches", "volume-size": [6, 6, 6]},
        {"items": "slices", "image-size": 12},
    ],
    ids=lambda data: data["items"],
)
def test_the_mask_of_a_volume_has_its_affine_and_its_very_voxels(tmp_path, drawn, turn, data):
    values = np.zeros((9, 12, 12), np.float32)
    values[0, 0, :3] = values[5:8, 9:, 2:7] = 300
    write_nifti(Volume(values=values, affine=TURNS[turn]), tmp_path / "scan.nii")
    (found,), folder = drawn("outline", LUNG, tmp_path / "scan.nii", **data)
    mask, overlay = found.drawn
    result = read_nifti(folder / mask.file, labels=True)
    np.testing.assert_allclose(result.affine, TURNS[turn], atol=1e-6)
    assert np.array_equal(result.values, values > 0)
    assert found.voxels["lung"] * found.voxel_ml == pytest.approx((values > 0).sum() * 3 / 1000)
    assert overlay.slice is not None


def test_what_a_volume_network_did_not_see_is_not_in_the_mask(tmp_path, drawn):
    values = np.full((8, 8, 8), 255, np.float32)
    values[0, 0, 0] = 0  # so that there is a range
    write_nifti(Volume(values=values, affine=affine_of((1.0, 1.0, 1.0))), tmp_path / "scan.nii")
    _, folder = drawn("outline", LUNG, tmp_path / "scan.nii", **{"items": "volumes", "volume-size": [4, 4, 4]})
    seen = np.zeros((8, 8, 8), bool)
    seen[2:6, 2:6, 2:6] = True
    assert np.array_equal(read_nifti(folder / "image-0001-mask.nii.gz", labels=True).values, seen)


@pytest.mark.parametrize(
    "data", [{"items": "patches", "volume-size": [8, 8, 8]}, {"items": "slices", "image-size": 32}]
)
def test_a_resampled_volume_comes_back_within_a_voxel(tmp_path, drawn, data):
    values = np.zeros((12, 24, 20), np.float32)
    values[3:8, 10:20, 4:14] = 100
    write_nifti(Volume(values=values, affine=affine_of((2.0, 1.0, 1.0))), tmp_path / "scan.nii")
    _, folder = drawn("outline", LUNG, tmp_path / "scan.nii", **{"spacing-mm": [1.5, 1.5, 1.5], **data})
    mask = read_nifti(folder / "image-0001-mask.nii.gz", labels=True).values
    assert mask.shape == values.shape
    edges = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)]
    assert np.abs(np.array(edges) - [(3, 7), (10, 19), (4, 13)]).max() <= 1


def test_the_likeliest_label_alone_has_the_pixel(tmp_path, drawn):
    values = np.zeros((32, 32))
    values[4:12, 4:12], values[20:28, 20:28] = 160, 255
    image = grey_png(tmp_path / "image.png", values)
    task = {"kind": "segmentation", "labels": ["tissue", "bone"]}
    (found,), folder = drawn("outline", task, image, **{"image-size": 32})
    expected = np.select([values > 200, values > 100], [2, 1])
    assert np.array_equal(read_mask(folder / found.drawn[0].file), expected)
    assert found.voxels == {"tissue": 64, "bone": 64}


def test_of_two_labels_that_both_seem_certain_the_likelier_has_the_pixel(tmp_path, drawn):
    values = np.zeros((32, 32))
    values[4:12, 4:12] = 255
    task = {"kind": "segmentation", "labels": ["tissue", "bone"]}
    (found,), _ = drawn("sure", task, grey_png(tmp_path / "image.png", values), **{"image-size": 32})
    assert found.voxels == {"tissue": 0, "bone": 64}, "as in evaluation, though a sigmoid in float32 is 1 of both"


@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 3.0, 30.0]))
def test_a_pixel_has_the_label_that_it_has_in_the_evaluation(labels, seed, scale):
    logits = np.random.default_rng(seed).normal(0, scale, (labels, 1, 8, 8)).astype(np.float32)
    above = likeliest_alone(torch.from_numpy(logits)[None])[0].numpy() > 0
    original = Frames(planes=np.zeros((1, 1, 8, 8), np.uint8), aspect=1.0)
    found = classes_of(likelihoods(logits), original)
    assert np.array_equal(found, np.where(above.any(0), above.argmax(0) + 1, 0))


# Pictures


def test_the_heat_colours_rise_evenly_in_lightness():
    """CIE L* of sRGB (IEC 61966-2-1), which they were not made with."""
    encoded = heat_colours() / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert (np.diff(lightness) > 0).all()
    steps = np.diff(lightness[::16])
    assert steps.min() > 0.7 * steps.mean() and steps.max() < 1.3 * steps.mean()


def test_an_overlay_has_square_pixels_and_no_side_above_the_longest():
    grey = np.zeros((100, 3000), np.uint8)
    assert heat_overlay(grey, grey.astype(np.float32)).shape == (round(100 * LONGEST / 3000), LONGEST, 3)
    assert region_overlay(grey[:, :50], grey[:, :50], (5.0, 1.0)).shape == (500, 50, 3)
    assert region_overlay(grey[:, :50], grey[:, :50], (1.0, 2.5)).shape == (100, 125, 3)


def test_heat_below_the_threshold_is_transparent():
    grey = np.full((4, 4), 90, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0], heat[3, 3] = 0.1, 1.0
    overlay = heat_overlay(grey, heat)
    assert overlay[0, 0].tolist() == [90, 90, 90]
    mixed = 0.4 * 90 + 0.6 * heat_colours()[255].astype(float)
    assert np.abs(overlay[3, 3] - mixed).max() <= 0.5


# What is said of volumes


def test_the_probability_of_a_volume_is_the_mean_over_its_slices(tmp_path, drawn):
    values = np.zeros((2, 8, 8), np.float32)
    values[1] = 255
    write_nifti(Volume(values=values, affine=affine_of((1.0, 1.0, 1.0))), tmp_path / "scan.nii")
    data = {"items": "slices", "image-size": 8}
    (found,), _ = drawn("spot", FINDING, tmp_path / "scan.nii", **data)
    assert found.probabilities["bright"] == pytest.approx((0.5 + 1 / (1 + np.exp(-1))) / 2, abs=1e-6)


def test_an_image_that_the_network_cannot_take_is_a_row(tmp_path, process):
    volume = np.random.default_rng(0).random((4, 8, 8), np.float32)
    for name, values in (("a", np.zeros((4, 8, 8), np.float32)), ("b", volume)):
        write_nifti(Volume(values=values, affine=affine_of((1.0, 1.0, 1.0))), tmp_path / f"{name}.nii")
    data = {"items": "volumes", "volume-size": [2, 8, 8]}
    kept = load_kept(kept_run(tmp_path / "run", {"name": "kept_runs:Picky"}, FINDING, **data))
    first, second = predict_images(kept, [tmp_path / "a.nii", tmp_path / "b.nii"], tmp_path, process)
    assert first.error == "the network fails on it (ValueError)"
    assert set(second.probabilities) == {"bright", "dark"}


# Real images


@pytest.mark.skipif(not (DATA / "vol3d").is_dir(), reason="the real images are not beside the repository")
def test_real_volumes_have_masks_on_their_own_grid(drawn):
    scans = sorted((DATA / "vol3d" / "dev").rglob("*.nii.gz"))[:2]
    data = {"items": "volumes", "volume-size": [48, 48, 48], "preset": "mr"}
    _, folder = drawn({"name": "attention-unet", "width": 2}, LUNG, *scans, heat_maps=(), **data)
    for number, scan in enumerate(scans, start=1):
        mask, image = read_nifti(folder / f"image-{number:04d}-mask.nii.gz", labels=True), read_nifti(scan)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
