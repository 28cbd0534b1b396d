"""Files that are no DICOM, and the geometry of resizing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmed.errors import ConfigError, UnreadableImage
from fedmed.imaging.reading import read_image, read_mask
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
    with pytest.raises(ConfigError, match="cxr, color"):
        read_image(tmp_path / "a.png", preset="ct")


def test_mask_keeps_numbers_and_refuses_colour(tmp_path: Path) -> None:
    numbers = np.array([[0, 1], [2, 255]], np.uint8)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), numbers)
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(UnreadableImage, match="colours"):
        read_mask(tmp_path / "b.png")


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


def test_letterbox_is_torchs_antialiased_bilinear() -> None:
    image = np.random.default_rng(0).random((1, 100, 100), dtype=np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None], (40, 40), mode="bilinear", antialias=True)
    np.testing.assert_allclose(letterbox(image, 40), expected[0].numpy(), atol=1e-6)


def test_mask_and_image_stay_in_register() -> None:
    image = np.zeros((1, 120, 90), np.float32)
    image[0, 30:60, 20:50] = 1
    small, mask = letterbox(image, 32)[0], letterbox_mask(image.astype(np.uint8), 32)[0]
    centre = [(np.indices(a.shape) * a).sum((1, 2)) / a.sum() for a in (small, mask.astype(float))]
    np.testing.assert_allclose(centre[0], centre[1], atol=0.35)
