"""Files that are no DICOM, what presets make of a picture, and the geometry of resizing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_files import cells_of, image_object, item_of, picture, written
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, MRImageStorage

from fedmed.errors import ConfigError, UnreadableImage
from fedmed.imaging.reading import PRESETS, read_frames, read_image, read_mask, to_unit_range
from fedmed.imaging.resize import fitted, letterbox, letterbox_mask


def test_grey_png_of_8_and_16_bits_scale_by_their_full_range(tmp_path: Path) -> None:
    values = np.arange(12).reshape(3, 4)
    Image.fromarray((values * 20).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray((values * 5000).astype(np.uint16)).save(tmp_path / "b.png")
    np.testing.assert_allclose(read_image(tmp_path / "a.png")[0], values * 20 / 255, atol=1e-6)
    np.testing.assert_allclose(read_image(tmp_path / "b.png")[0], values * 5000 / 65535, atol=1e-6)


def test_colour_png_is_grey_under_cxr_and_kept_under_color(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    grey, colour = read_image(tmp_path / "a.png"), read_image(tmp_path / "a.png", preset="color")
    np.testing.assert_allclose(colour, rgb.transpose(2, 0, 1) / 255, atol=1e-6)
    np.testing.assert_allclose(grey[0], rgb @ np.array([0.299, 0.587, 0.114]) / 255, atol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB"])
def test_every_png_mode_is_one_grey_channel(tmp_path: Path, mode: str) -> None:
    Image.new("L", (6, 4), 255).convert(mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 4, 6)
    np.testing.assert_allclose(image, 1, atol=1e-5)


def test_jpeg_is_read(tmp_path: Path) -> None:
    Image.new("L", (16, 16), 128).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), 128 / 255, atol=0.01)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "neither"), (b"patient_id,image\n", "neither"), (b"\0" * 128 + b"DICM", "header lacks|cannot be decoded"),
     (b"\x89PNG\r\n\x1a\n", "neither|truncated|decoded")],
)  # fmt: skip
def test_what_is_no_image_has_a_reason_and_no_path(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "secret-name.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_truncated_png_and_jpeg(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UnreadableImage, match="truncated"):
            read_image(tmp_path / name)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="no such file"):
        read_image(tmp_path / "none.dcm")
    with pytest.raises(UnreadableImage, match="a folder"):
        read_image(tmp_path)


def test_huge_png_header_is_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="larger than"):
        read_image(tmp_path / "a.png")


def test_unknown_preset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are cxr, cxr-sc, ct-lung"):
        read_image(tmp_path / "a.png", preset="ct")


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("labels", [0, 1, 3])
def test_mask_keeps_numbers_in_every_mode_that_is_grey(tmp_path: Path, mode: str, labels: int) -> None:
    numbers = np.array([[0, 1], [2, 255]], np.uint8)
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", labels=labels), numbers)


@pytest.mark.parametrize(
    ("mode", "colour", "reason"), [("RGB", (0, 0, 1), "colours"), ("RGBA", (9, 9, 9, 254), "transparent")]
)
def test_mask_refuses_colour_and_what_is_seen_through(tmp_path: Path, mode: str, colour: tuple, reason: str) -> None:
    Image.new(mode, (2, 2), colour).save(tmp_path / "b.png")
    with pytest.raises(UnreadableImage, match=reason):
        read_mask(tmp_path / "b.png")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_mask_of_one_label_is_cut_at_half_where_its_edges_are_soft(tmp_path: Path, mode: str) -> None:
    y, x = np.mgrid[0:64, 0:64]
    disc = (y - 30) ** 2 + (x - 34) ** 2 < 400
    hard = Image.fromarray((disc * 255).astype(np.uint8)).convert(mode)
    hard.save(tmp_path / "a.jpg", quality=75)
    assert (np.asarray(Image.open(tmp_path / "a.jpg").convert("L")) > 0).sum() > disc.sum() + 20
    hard.resize((256, 256), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BOX).save(tmp_path / "b.png")
    for name in ("a.jpg", "b.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name, labels=1), disc)
    numbered = np.arange(256, dtype=np.uint8).reshape(16, 16)  # of single cells, up to 255: no soft edges
    Image.fromarray(numbered).convert(mode).save(tmp_path / "c.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "c.png", labels=1), numbered)
    with pytest.raises(UnreadableImage, match="JPEG blurs the numbers of several labels"):
        read_mask(tmp_path / "a.jpg", labels=2)


def test_photographs_are_upright_as_their_exif_data_say(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned right by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(pixels).save(tmp_path / "b.jpg", exif=b"Exif\0\0damaged", quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg")[0], np.rot90(pixels, -1) / 255, atol=0.02)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.jpg", labels=1), np.rot90(pixels, -1) > 0)
    np.testing.assert_allclose(read_image(tmp_path / "b.jpg")[0], pixels / 255, atol=0.02)


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.integers(8, 64))
def test_letterbox_keeps_aspect_and_centres(height: int, width: int, size: int) -> None:
    square = letterbox(np.ones((1, height, width), np.float32), size)
    mask = letterbox_mask(np.ones((2, height, width), np.uint8), size)
    assert square.shape == (1, size, size)
    assert mask.shape == (2, size, size)
    np.testing.assert_array_equal(square[0] > 0.5, mask[0] == 1)  # identical geometry
    rows, columns = mask[0].any(axis=1), mask[0].any(axis=0)
    assert (rows.sum(), columns.sum()) == fitted((height, width), size)
    for line in (rows, columns):
        assert abs(int(np.argmax(line)) - int(np.argmax(line[::-1]))) <= 1
    assert max(rows.sum(), columns.sum()) == size


@pytest.mark.parametrize("size", [40, 100, 173])
def test_letterbox_is_torchs_antialiased_bilinear(size: int) -> None:
    image = np.random.default_rng(0).random((3, 100, 100), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None], (size, size), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(letterbox(image, size), expected[0].numpy(), atol=1e-5)


def test_reading_and_resizing_need_no_torch() -> None:
    code = "import sys, fedmed.imaging.reading, fedmed.imaging.resize; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_mask_and_image_stay_in_register() -> None:
    image = np.zeros((1, 120, 90), np.float32)
    image[0, 30:60, 20:50] = 1
    small, mask = letterbox(image, 32)[0], letterbox_mask(image.astype(np.uint8), 32)[0]
    centre = [(np.indices(a.shape) * a).sum((1, 2)) / a.sum() for a in (small, mask.astype(float))]
    np.testing.assert_allclose(centre[0], centre[1], atol=0.35)


HU = np.linspace(-1500, 3000, 96 * 80).reshape(96, 80).round()


def ct(path: Path, **tags: object) -> Path:
    cells = (HU + 1500).astype(np.uint16)
    about = {"SOPClassUID": CTImageStorage, "RescaleSlope": 1, "RescaleIntercept": -1500, "WindowCenter": 999,
             "WindowWidth": 7}  # fmt: skip
    return written(image_object(cells, bits=16, **{**about, **tags}), path)


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("ct-lung", -1350, 150), ("ct-soft", -160, 240), ("ct-brain", 0, 80), ("ct-bone", -450, 1050)],
)
def test_ct_presets_cut_their_window_in_hu_whatever_the_file_says(
    tmp_path: Path, preset: str, low: int, high: int
) -> None:
    shown = read_image(ct(tmp_path / "x"), preset=preset)[0]
    np.testing.assert_allclose(shown, np.clip((HU - low) / (high - low), 0, 1), atol=1e-5)
    inverted = read_image(ct(tmp_path / "y", PhotometricInterpretation="MONOCHROME1"), preset=preset)[0]
    np.testing.assert_array_equal(inverted, shown)  # HU are quantities


def test_ct_presets_refuse_what_has_no_hounsfield_units(tmp_path: Path) -> None:
    for tags, reason in (
        ({"SOPClassUID": MRImageStorage}, "not an image of modality CT"),
        ({"RescaleSlope": None}, "not in Hounsfield units"),
        ({"RescaleType": "MGML"}, "not in Hounsfield units"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            read_image(ct(tmp_path / "x", **tags), preset="ct-soft")
    assert read_image(ct(tmp_path / "x", RescaleType="HU"), preset="ct-soft").any()


def test_padding_of_ct_is_black_in_every_window(tmp_path: Path) -> None:
    path = ct(tmp_path / "x", PixelPaddingValue=int(HU[95, 79] + 1500))
    assert read_image(path, preset="ct-bone")[0, 95, 79] == 0
    assert read_image(path, preset="ct-bone")[0, 95, 78] == 1


def test_enhanced_ct_says_its_rescale_for_each_frame(tmp_path: Path) -> None:
    cells = np.stack([(HU + 1500).astype(np.uint16)] * 2)
    groups = [
        item_of(PixelValueTransformationSequence=[item_of(RescaleSlope=1, RescaleIntercept=offset, RescaleType="HU")])
        for offset in (-1500, -1400)
    ]
    ds = image_object(cells, bits=16, SOPClassUID=EnhancedCTImageStorage, PerFrameFunctionalGroupsSequence=groups)
    first, second = read_frames(written(ds, tmp_path / "x"), "ct-soft")
    np.testing.assert_allclose(first[0], np.clip((HU + 160) / 400, 0, 1), atol=1e-5)
    np.testing.assert_allclose(second[0], np.clip((HU + 260) / 400, 0, 1), atol=1e-5)


@pytest.mark.parametrize("highest", [112.0, 1.7e6])
def test_mr_is_the_same_picture_on_every_scale(highest: float) -> None:
    volume = np.zeros((6, 40, 40), np.float32)
    volume[1:-1, 5:-5, 5:-5] = 1 + np.random.default_rng(0).random((4, 30, 30))
    scaled = to_unit_range(volume * np.float32(highest / 2), "mr")
    np.testing.assert_allclose(scaled, to_unit_range(volume, "mr"), atol=1e-5)
    inside = np.sort(volume[volume > 0])
    low, high = np.percentile(inside, [0.5, 99.5])
    np.testing.assert_allclose(scaled[volume > 0], np.clip((volume[volume > 0] - low) / (high - low), 0, 1), atol=1e-4)
    assert not scaled[volume == 0].any()


def test_background_of_a_volume_that_was_centred_is_black() -> None:
    volume = np.full((5, 20, 20), 0, np.float32)
    volume[:, 4:16, 4:16] = np.random.default_rng(0).normal(size=(5, 12, 12))  # as z-scored brains have it
    assert not to_unit_range(volume, "mr")[:, :4].any()


def test_what_is_not_valid_neither_counts_nor_shows() -> None:
    values = np.array([[1.0, 2.0, 3.0], [4.0, 9999.0, 2.5]], np.float32)
    valid = values < 1000
    kept = values.copy()
    scaled = to_unit_range(values, "us", valid=valid)
    np.testing.assert_allclose(scaled, [[0, 1 / 3, 2 / 3], [1, 0, 0.5]], atol=1e-6)
    np.testing.assert_array_equal(values, kept)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("values", [np.zeros((4, 4)), np.full((4, 4), -7.5), np.array([[1.0]]), np.zeros((0, 3))])
def test_flat_and_empty_values_are_in_range(preset: str, values: np.ndarray) -> None:
    scaled = to_unit_range(values.astype(np.float32), preset, valid=np.zeros(values.shape, bool))
    assert scaled.shape == values.shape
    assert not scaled.any()


def test_mr_with_low_values_white_is_turned(tmp_path: Path) -> None:
    cells = cells_of(picture())
    plain = written(image_object(cells, SOPClassUID=MRImageStorage), tmp_path / "x")
    turned = image_object(4095 - cells, SOPClassUID=MRImageStorage, PhotometricInterpretation="MONOCHROME1")
    shown = read_image(plain, preset="mr")
    np.testing.assert_allclose(read_image(written(turned, tmp_path / "y"), preset="mr"), shown, atol=1e-5)
    assert (shown.min(), shown.max()) == (0, 1)
