"""One row of a manifest: how many bits are kept, and what slices, frames, volumes and patches become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import image_object, item_of, written
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from phantom_series import Acquisition, enhanced_object, phantom_body, slice_objects, write_series
from PIL import Image

from fedmed.errors import ConfigError, DataError, UnreadableImage
from fedmed.imaging.items import item, needs_eight_bits_only, quantised
from fedmed.imaging.reading import read_image
from fedmed.imaging.recipe import Recipe
from fedmed.imaging.resize import letterbox
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.volume import Volume
from fedmed.training.predict.originals import original

PICTURE = Recipe(preset="cxr", image_size=16)
# 12 slices of 24 by 20, axial: rows to the back, columns to the left, so canonical turns both
CT = Acquisition(spacing_mm=(3.0, 1.5, 1.5))
WINDOW = (-1000, 160)  # what the phantom's body spans


def png(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def read(image: object, recipe: Recipe, mask: object = "") -> dict[str, np.ndarray]:
    return item(image=str(image), mask=str(mask), recipe=recipe.settings())


def nifti(path: Path, values: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Path:
    """Values (D, H, W) in canonical orientation."""
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = spacing
    affine[3, 3] = 1
    write_nifti(Volume(values=values, affine=affine), path)
    return path


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, Path]:
    """A CT series, its values (D, H, W) in canonical orientation, and a mask of its lesion as NIfTI."""
    folder = tmp_path_factory.mktemp("ct")
    values, lesion = phantom_body(CT.shape)
    write_series(folder / "series", values, CT)
    write_nifti(Volume(values=lesion, affine=CT.affine), folder / "mask.nii.gz")
    return folder / "series", values[:, ::-1, ::-1], folder / "mask.nii.gz"


def changed_series(folder: Path, acquisition: Acquisition, values: np.ndarray, tags: dict[str, object]) -> None:
    """A series with these attributes in every slice; None removes one."""
    folder.mkdir(exist_ok=True)
    for number, ds in enumerate(slice_objects(values, acquisition)):
        for keyword, value in tags.items():
            ds.pop(keyword, None) if value is None else setattr(ds, keyword, value)
        ds.save_as(folder / f"{number}", enforce_file_format=True)


def windowed(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values - low) / (high - low), 0, 1)


def test_a_picture_of_eight_bits_keeps_eight_and_errs_by_half_a_level_at_most(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32), np.uint8)
    kept = read(png(tmp_path / "a.png", pixels), PICTURE)["images"]
    assert kept.dtype == np.uint8 and kept.shape == (1, 1, 16, 16)
    exact = letterbox(read_image(tmp_path / "a.png"), 16)
    assert np.abs(kept[0] / 255 - exact).max() <= 0.5 / 255 + 1e-6
    whole = read(str(tmp_path / "a.png"), replace(PICTURE, image_size=40))["images"]
    np.testing.assert_array_equal(whole[0, 0, :, 4:36], pixels)  # not resized: not changed at all


def test_a_picture_of_more_bits_keeps_sixteen(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (16, 16)).astype(np.uint16) * 16
    kept = read(png(tmp_path / "a.png", pixels), PICTURE)["images"]
    assert kept.dtype == np.uint16
    np.testing.assert_array_equal(kept[0, 0], pixels)


@given(levels=arrays.arrays(np.uint8, (7, 5)))
def test_every_value_of_eight_bits_is_found_to_be_one_and_comes_back(levels: np.ndarray) -> None:
    values = levels.astype(np.float32) / np.float32(255)
    assert needs_eight_bits_only(values)
    np.testing.assert_array_equal(quantised(values, eight_bits=True), levels)


@given(levels=arrays.arrays(np.uint16, (7, 5)), one=st.integers(0, 65535).filter(lambda level: level % 257))
def test_one_value_between_the_levels_is_enough_for_sixteen(levels: np.ndarray, one: int) -> None:
    levels[3, 3] = one
    values = levels.astype(np.float32) / np.float32(65535)
    assert not needs_eight_bits_only(values)
    np.testing.assert_array_equal(quantised(values, eight_bits=False), levels)


def test_colour_has_three_channels_and_a_volume_is_no_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    kept = read(png(tmp_path / "a.png", pixels), replace(PICTURE, preset="color"))["images"]
    np.testing.assert_array_equal(kept[0], pixels.transpose(2, 0, 1))
    with pytest.raises(UnreadableImage, match=r'a volume; data\.items = "slices"'):
        read(tmp_path, PICTURE)


def test_slices_are_the_planes_of_the_canonical_volume_in_order(series: tuple[Path, np.ndarray, Path]) -> None:
    folder, values, mask = series
    recipe = Recipe(preset="ct-soft", items="slices", image_size=24, labels=1, regions=("lesion",))
    kept = read(folder, recipe, mask)
    assert kept["images"].shape == kept["masks"].shape == (12, 1, 24, 24)
    shown = windowed(values, -160, 240)
    np.testing.assert_allclose(kept["images"][:, 0, :, 2:22] / 65535, shown, atol=1e-5)
    assert not kept["images"][..., :2].any() and not kept["images"][..., 22:].any()
    lesion = (values > 100).astype(np.uint8)
    assert lesion.any()
    np.testing.assert_array_equal(kept["masks"][:, 0, :, 2:22], lesion)


def test_an_enhanced_object_has_the_slices_of_its_series_whatever_the_order_of_frames(
    series: tuple[Path, np.ndarray, Path], tmp_path: Path
) -> None:
    folder, values, _ = series
    order = np.random.default_rng(1).permutation(12).tolist()
    ds = enhanced_object(values[:, ::-1, ::-1], CT, order)
    ds.save_as(tmp_path / "enhanced", enforce_file_format=True)
    recipe = Recipe(preset="ct-soft", items="slices", image_size=24)
    np.testing.assert_array_equal(read(tmp_path / "enhanced", recipe)["images"], read(folder, recipe)["images"])


def disc(row_mm: float, column_mm: float) -> np.ndarray:
    """A circle of 30 mm around the centre of 48 by 48 mm, in pixels of these sides."""
    y, x = np.mgrid[row_mm / 2 : 48 : row_mm, column_mm / 2 : 48 : column_mm] - 24
    return np.hypot(y, x) < 15


@pytest.mark.parametrize(
    ("row_mm", "column_mm", "tags"),
    [
        (1.0, 0.75, {"PixelAspectRatio": [4, 3]}),
        (0.8, 0.4, {"PixelSpacing": [0.8, 0.4], "PixelAspectRatio": [1, 1]}),
        (0.4, 0.8, {"ImagerPixelSpacing": [0.4, 0.8]}),
        (0.4, 0.8, {"SharedFunctionalGroupsSequence": [item_of(PixelMeasuresSequence=[item_of(PixelSpacing=[4, 8])])]}),
    ],
)
@pytest.mark.parametrize("items", ["images", "slices"])
def test_circles_stay_round_where_pixels_are_not_square(
    tmp_path: Path, row_mm: float, column_mm: float, tags: dict, items: str
) -> None:
    round_one = disc(row_mm, column_mm)
    path = written(image_object((round_one * 4095).astype(np.uint16), **tags), tmp_path / "x")
    recipe = replace(PICTURE, items=items, image_size=48, labels=1)
    mask = png(tmp_path / "m.png", round_one.astype(np.uint8)) if items == "images" else ""
    kept = read(path, recipe, mask)
    shown = kept["images"][0, 0] > kept["images"].max() / 2
    for plane in (shown, kept["masks"][0, 0]) if mask else (shown,):
        height, width = (np.ptp(np.flatnonzero(plane.any(axis=axis))) + 1 for axis in (1, 0))
        assert abs(height - 30) <= 1 and abs(width - 30) <= 1


def test_slices_of_a_volume_keep_the_proportions_of_its_voxels(tmp_path: Path) -> None:
    round_one = np.stack([disc(2.0, 0.8).astype(np.float32)] * 3)
    image = nifti(tmp_path / "i.nii", round_one, (5.0, 2.0, 0.8))
    mask = nifti(tmp_path / "m.nii", round_one.astype(np.int16), (5.0, 2.0, 0.8))
    kept = read(image, Recipe(preset="us", items="slices", image_size=48, labels=1, regions=("a",)), mask)
    for plane in (kept["images"][1, 0] > kept["images"].max() / 2, kept["masks"][1, 0]):
        height, width = (np.ptp(np.flatnonzero(plane.any(axis=axis))) + 1 for axis in (1, 0))
        assert abs(height - 30) <= 2 and abs(width - 30) <= 1


@pytest.mark.parametrize(
    "tags",
    [{"PixelSpacing": [0.1, 0.1009]}, {"PixelSpacing": [0, 1]}, {"PixelSpacing": 2}, {"PixelAspectRatio": [0, 0]}],
)
def test_nearly_square_pixels_and_impossible_ones_change_nothing(tmp_path: Path, tags: dict) -> None:
    cells = (disc(1, 1) * 4000).astype(np.uint16)
    plain, said = (read(written(image_object(cells, **each), tmp_path / "x"), PICTURE) for each in ({}, tags))
    np.testing.assert_array_equal(said["images"], plain["images"])


def test_a_single_picture_is_one_slice_and_takes_no_mask(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", np.full((20, 16), 9, np.uint8))
    recipe = replace(PICTURE, items="slices")
    np.testing.assert_array_equal(read(path, recipe)["images"], read(path, PICTURE)["images"])
    with pytest.raises(UnreadableImage, match="masks of frames"):
        read(path, replace(recipe, labels=1), path)


@pytest.mark.parametrize("size", [(6, 30, 10), (12, 24, 20), (20, 8, 40)])
def test_volumes_are_cropped_or_padded_at_the_centre_with_their_masks(
    series: tuple[Path, np.ndarray, Path], size: tuple[int, int, int]
) -> None:
    folder, values, mask = series
    recipe = Recipe(preset="ct-soft", items="volumes", volume_size=size, labels=1, regions=("lesion",))
    kept = read(folder, recipe, mask)
    assert kept["images"].shape == kept["masks"].shape == (1, 1, *size)
    for array, whole in (
        (kept["images"][0, 0] / 65535, windowed(values, -160, 240)), (kept["masks"][0, 0], values > 100)
    ):  # fmt: skip
        inner = [slice(max(0, (new - old) // 2), max(0, (new - old) // 2) + min(old, new))
                 for old, new in zip(whole.shape, size, strict=True)]  # fmt: skip
        outer = [slice(max(0, (old - new) // 2), max(0, (old - new) // 2) + min(old, new))
                 for old, new in zip(whole.shape, size, strict=True)]  # fmt: skip
        np.testing.assert_allclose(array[tuple(inner)], whole[tuple(outer)], atol=1e-5)
        padding = np.ones(size, bool)
        padding[tuple(inner)] = False
        assert not array[padding].any()


def test_patches_keep_the_volume_whole_at_its_spacing(series: tuple[Path, np.ndarray, Path]) -> None:
    folder, values, mask = series
    recipe = Recipe(preset="ct-soft", items="patches", labels=1, regions=("lesion",))
    assert read(folder, recipe, mask)["images"].shape == (1, 1, 12, 24, 20)
    finer = read(folder, replace(recipe, spacing_mm=(3.0, 3.0, 3.0)), mask)
    assert finer["images"].shape == finer["masks"].shape == (1, 1, 12, 12, 10)
    assert set(np.unique(finer["masks"])) == {0, 1}
    assert abs(finer["images"].mean() / 65535 - windowed(values, -160, 240).mean()) < 0.02


def test_a_nifti_in_another_orientation_gives_the_same_volume(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((5, 6, 7), np.float32) * 1e5
    nifti(tmp_path / "a.nii.gz", values)
    turned = np.zeros((4, 4))
    turned[[0, 2, 1], [0, 1, 2]] = [-1, 1, -1]  # (d, h, w) runs to the left, to the head, to the back
    turned[:3, 3], turned[3, 3] = (6, 5, 0), 1
    write_nifti(Volume(values=values.transpose(2, 0, 1)[::-1, :, ::-1].copy(), affine=turned), tmp_path / "b.nii")
    recipe = Recipe(preset="mr", items="patches")
    one, two = (read(tmp_path / name, recipe)["images"] for name in ("a.nii.gz", "b.nii"))
    assert one.dtype == np.uint16
    np.testing.assert_array_equal(one, two)


def test_several_labels_are_numbered_and_others_are_refused(tmp_path: Path) -> None:
    image = nifti(tmp_path / "i.nii", np.random.default_rng(0).random((4, 6, 6), np.float32))
    classes = np.random.default_rng(1).integers(0, 4, (4, 6, 6)).astype(np.int16)
    mask = nifti(tmp_path / "m.nii", classes)
    recipe = Recipe(preset="mr", items="patches", labels=3, regions=("a", "b", "c"))
    np.testing.assert_array_equal(read(image, recipe, mask)["masks"][0, 0], classes)
    with pytest.raises(DataError, match="the mask holds 3, but the task has 2 labels"):
        read(image, replace(recipe, labels=2, regions=("a", "b")), mask)
    only = read(image, replace(recipe, labels=1, regions=("any",)), mask)["masks"][0, 0]
    np.testing.assert_array_equal(only, classes > 0)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    image = nifti(tmp_path / "i.nii", np.ones((4, 6, 6), np.float32))
    mask = nifti(tmp_path / "m.nii", np.ones((4, 6, 5), np.int16))
    with pytest.raises(UnreadableImage, match="the mask is 4 by 6 by 5 voxels, its image 4 by 6 by 6"):
        read(image, Recipe(preset="mr", items="patches", labels=1, regions=("a",)), mask)


def test_a_ct_window_is_not_for_other_modalities(tmp_path: Path) -> None:
    mr = replace(CT, modality="MR")
    write_series(tmp_path / "mr", np.abs(phantom_body(mr.shape)[0]), mr)
    with pytest.raises(UnreadableImage, match="not a CT"):
        read(tmp_path / "mr", Recipe(preset="ct-lung", items="patches"))


@pytest.mark.parametrize("tags", [{"RescaleSlope": None}, {"RescaleType": "MGML"}])
@pytest.mark.parametrize("items", ["slices", "patches"])
def test_a_ct_window_is_not_for_what_is_not_in_hounsfield_units(tmp_path: Path, tags: dict, items: str) -> None:
    changed_series(tmp_path, CT, phantom_body(CT.shape)[0], tags)
    recipe = Recipe(preset="ct-soft", items=items, image_size=24)
    with pytest.raises(UnreadableImage, match="not in Hounsfield units"):
        read(tmp_path, recipe)
    with pytest.raises(UnreadableImage, match="not in Hounsfield units"):
        original(str(tmp_path), recipe.settings())
    assert read(tmp_path, replace(recipe, preset="mr"))["images"].any()


@pytest.mark.parametrize("modality", ["MR", "PT", "CT"])
def test_volumes_with_low_values_white_are_turned_as_pictures_are_but_not_hounsfield_units(
    tmp_path: Path, modality: str
) -> None:
    scanned = replace(CT, modality=modality)
    values = np.random.default_rng(0).integers(1, 32000, CT.shape).astype(np.float32) / (32 if modality == "CT" else 1)
    preset = {"MR": "mr", "PT": "pet", "CT": "ct-lung"}[modality]
    recipe = Recipe(preset=preset, items="patches")
    changed_series(tmp_path / "plain", scanned, values, {})
    changed_series(tmp_path / "turned", scanned, values, {"PhotometricInterpretation": "MONOCHROME1"})
    plain, turned = (read(tmp_path / name, recipe)["images"] / 65535 for name in ("plain", "turned"))
    np.testing.assert_allclose(turned, plain if modality == "CT" else 1 - plain, atol=2e-5)
    first = min((tmp_path / "turned").iterdir())
    ds = pydicom.dcmread(first)
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.save_as(first)
    if modality == "CT":  # a window in HU does not ask
        assert np.array_equal(read(tmp_path / "turned", recipe)["images"], read(tmp_path / "plain", recipe)["images"])
        return
    with pytest.raises(UnreadableImage, match="some show low values as white"):
        read(tmp_path / "turned", recipe)


@pytest.mark.parametrize("kind", ["images", "slices", "volumes", "patches"])
def test_a_recipe_survives_json_and_drops_what_its_items_do_not_use(kind: str) -> None:
    recipe = Recipe.of(
        preset="mr", items=kind, image_size=32, spacing_mm=(1.0, 2.0, 2.0), volume_size=(8, 8, 8), labels=("a",)
    )
    assert Recipe.from_settings(recipe.settings()) == recipe
    assert recipe.depth == (kind in ("volumes", "patches"))
    assert (recipe.image_size, bool(recipe.spacing_mm), bool(recipe.volume_size)) == {
        "images": (32, False, False), "slices": (32, True, False), "volumes": (0, True, True),
        "patches": (0, True, False),
    }[kind]  # fmt: skip
    assert recipe.described().startswith(f"mr {kind}")


def test_refuses_unknown_items_and_volumes_without_a_size() -> None:
    options = {"preset": "mr", "image_size": 32, "spacing_mm": (), "volume_size": (), "labels": ()}
    with pytest.raises(ConfigError, match=r"data\.items"):
        Recipe.of(items="clips", **options)
    with pytest.raises(ConfigError, match=r"needs data\.volume-size"):
        Recipe.of(items="patches", **options)
