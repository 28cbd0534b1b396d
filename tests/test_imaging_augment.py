"""Augmentation: the same numbers move images and masks alike, in two and three dimensions, and change nothing given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fedmed.errors import ConfigError, DataError
from fedmed.imaging.augment import NAMES, Parameters, apply, sample
from fedmed.imaging.augment.parameters import ANGLE_DEG, CONTRAST, NOISE, SCALE, SHIFT

PLANAR, SPATIAL = (1, 24, 20), (1, 8, 24, 20)
SHAPES = pytest.mark.parametrize("shape", [PLANAR, SPATIAL], ids=["2D", "3D"])


def neutral(count: int, axes: int, **changes) -> Parameters:
    values = {
        "flip": np.zeros(count, bool), "angle_deg": np.zeros(count), "scale": np.ones(count),
        "shift": np.zeros((count, axes)), "contrast": np.ones(count), "noise": np.zeros(count),
        "noise_seed": np.zeros(count, np.int64),
    }  # fmt: skip
    return Parameters(**(values | changes))


def batch(shape: tuple[int, ...], count: int = 3, labels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((count, *shape), generator=generator)
    return images, (torch.rand((count, labels, *shape[1:]), generator=generator) > 0.5).float()


def block(shape: tuple[int, ...]) -> torch.Tensor:
    """A smooth blob on black, off the centre."""
    image = np.zeros(shape, np.float32)
    image[(0, *(slice(side // 3, side // 2 + 1) for side in shape[1:]))] = 1
    return torch.from_numpy(ndimage.gaussian_filter(image, [0, *[1.2] * (len(shape) - 1)]))[None]


@SHAPES
def test_the_same_seed_gives_the_same_and_another_does_not(shape: tuple[int, ...]) -> None:
    images, masks = batch(shape)
    one, two, other = (apply(images, masks, sample(NAMES, shape, 3, np.random.default_rng(seed))) for seed in (5, 5, 6))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


@SHAPES
def test_images_of_a_batch_differ_and_stay_in_the_unit_range(shape: tuple[int, ...]) -> None:
    images = batch(shape)[0][:1].repeat(3, *[1] * len(shape))
    changed, _ = apply(images, None, sample(NAMES, shape, 3, np.random.default_rng(0)))
    assert not torch.equal(changed[0], changed[1]) and not torch.equal(changed[1], changed[2])
    assert changed.min() >= 0 and changed.max() <= 1
    assert changed.shape == images.shape and changed.dtype == torch.float32


@SHAPES
def test_what_was_given_is_not_changed(shape: tuple[int, ...]) -> None:
    images, masks = batch(shape)
    before = images.clone(), masks.clone()
    for name in NAMES:
        apply(images, masks, sample([name], shape, 3, np.random.default_rng(2)))
        assert torch.equal(images, before[0]) and torch.equal(masks, before[1]), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), spatial=st.booleans())
def test_masks_gain_no_value_and_move_as_their_images_do(seed: int, spatial: bool) -> None:
    """Where all neighbours that a pixel is interpolated from are 1, the nearest of them is 1 too; and so for 0."""
    shape = SPATIAL if spatial else PLANAR
    drawn = sample(("flip", "rotate", "scale", "shift"), shape, 2, np.random.default_rng(seed))
    drawn = replace(drawn, shift=drawn.shift + 1 / 64)  # never exactly between two pixels
    mask = (block(shape).repeat(2, *[1] * len(shape)) > 0.3).float()
    image, moved = apply(mask.clone(), mask, drawn)
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert moved[image > 1 - 1e-4].eq(1).all() and moved[image < 1e-4].eq(0).all()
    assert (image > 1 - 1e-4).sum() > 8


@SHAPES
def test_intensities_leave_masks_alone(shape: tuple[int, ...]) -> None:
    images, masks = batch(shape)
    changed, same = apply(images, masks, sample(("contrast", "noise"), shape, 3, np.random.default_rng(3)))
    assert torch.equal(same, masks)
    assert not torch.equal(changed, images)


@SHAPES
def test_neutral_numbers_change_nothing(shape: tuple[int, ...]) -> None:
    images, masks = batch(shape)
    for parameters in (neutral(3, len(shape) - 1), sample((), shape, 3, np.random.default_rng(0))):
        changed, same = apply(images, masks, parameters)
        assert torch.equal(changed, images) and torch.equal(same, masks)


@SHAPES
def test_a_flip_mirrors_left_and_right_of_those_that_are_flipped(shape: tuple[int, ...]) -> None:
    images, masks = batch(shape)
    parameters = neutral(3, len(shape) - 1, flip=np.array([True, False, True]))
    changed, mirrored = apply(images, masks, parameters)
    for given_, got in ((images, changed), (masks, mirrored)):
        assert torch.equal(got[[0, 2]], given_[[0, 2]].flip(-1)) and torch.equal(got[1], given_[1])


@SHAPES
def test_a_shift_by_whole_pixels_is_exact_and_towards_higher_indices(shape: tuple[int, ...]) -> None:
    images, _ = batch(shape, count=1)
    axes = len(shape) - 1
    pixels = [1, 3, 2][-axes:]
    shift = np.array([[count / side for count, side in zip(pixels, shape[1:], strict=True)]])
    changed, _ = apply(images, None, neutral(1, axes, shift=shift))
    expected = torch.zeros_like(images)
    into = tuple(slice(count, None) for count in pixels)
    out_of = tuple(slice(None, -count) for count in pixels)
    expected[(..., *into)] = images[(..., *out_of)]
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)


def test_every_slice_of_a_rotated_volume_is_the_rotated_slice() -> None:
    """Two and three dimensions share one interface; torchvision's rotation is the truth for torch's."""
    picture, _ = batch((1, 24, 20), count=2)
    numbers = {"angle_deg": np.array([8.0, -5.0]), "scale": np.ones(2)}
    flat, _ = apply(picture, None, neutral(2, 2, shift=np.array([[0.05, -0.1]] * 2), **numbers))
    volume = picture[:, :, None].repeat(1, 1, 5, 1, 1)
    deep, _ = apply(volume, None, neutral(2, 3, shift=np.array([[0.0, 0.05, -0.1]] * 2), **numbers))
    for index in range(5):
        torch.testing.assert_close(deep[:, :, index], flat, atol=1e-5, rtol=0)


def test_rotation_is_clockwise_and_scale_magnifies() -> None:
    image = torch.zeros(1, 1, 41, 41)
    image[..., 8:13, 19:22] = 1  # above the centre
    turned, _ = apply(image, None, neutral(1, 2, angle_deg=np.array([30.0])))
    row, column = ndimage.center_of_mass(turned[0, 0].numpy())
    distance = 10.0
    assert abs(row - (20 - distance * np.cos(np.pi / 6))) < 0.3
    assert abs(column - (20 + distance * np.sin(np.pi / 6))) < 0.3
    for shape in (PLANAR, SPATIAL):
        blob = block(shape)
        larger, _ = apply(blob, None, neutral(1, len(shape) - 1, scale=np.array([1.1])))
        assert abs(float(larger.sum() / blob.sum()) - 1.1 ** (len(shape) - 1)) < 0.03


def test_contrast_is_about_the_mean_and_noise_has_its_deviation() -> None:
    image = torch.full((1, 1, 64, 64), 0.5)
    image[..., :32, :] = 0.4
    changed, _ = apply(image, None, neutral(1, 2, contrast=np.array([1.2])))
    torch.testing.assert_close(changed.unique(), torch.tensor([0.39, 0.51]))
    noisy, _ = apply(torch.full((2, 1, 128, 128), 0.5), None, neutral(2, 2, noise=np.array([0.02, 0.0])))
    assert abs(float(noisy[0].std()) - 0.02) < 1e-3 and (noisy[1] == 0.5).all()


def test_padding_slices_of_a_volume_stay_zero() -> None:
    images = torch.rand(2, 2, 6, 8, 8) + 0.1
    images[0, :, :2], images[1, 1] = 0, 0
    drawn = sample(("contrast", "noise"), images.shape[1:], 2, np.random.default_rng(2))
    changed, _ = apply(images, None, drawn)
    blank = (images == 0).flatten(3).all(dim=3)
    assert torch.equal((changed == 0).flatten(3).all(dim=3), blank)
    assert not torch.equal(changed[~blank], images[~blank])


def test_numbers_stay_in_their_ranges_and_another_name_leaves_the_others_as_they_were() -> None:
    drawn = sample(NAMES, SPATIAL, 4000, np.random.default_rng(0))
    for values, neutral_value, most in (
        (drawn.angle_deg, 0, ANGLE_DEG), (drawn.scale, 1, SCALE), (drawn.shift, 0, SHIFT), (drawn.contrast, 1, CONTRAST)
    ):  # fmt: skip
        assert 0.95 * most < np.abs(values - neutral_value).max() <= most
    assert 0.95 * NOISE < drawn.noise.max() <= NOISE and drawn.noise.min() >= 0
    assert 0.45 < drawn.flip.mean() < 0.55
    alone = sample(["scale"], SPATIAL, 4000, np.random.default_rng(0))
    np.testing.assert_array_equal(alone.scale, drawn.scale)
    assert not alone.flip.any() and not alone.angle_deg.any() and not alone.noise.any()


def test_an_empty_batch_and_masks_of_labels_that_do_not_exist() -> None:
    images, masks = apply(torch.zeros(0, *PLANAR), None, sample(NAMES, PLANAR, 0, np.random.default_rng(0)))
    assert images.shape == (0, *PLANAR) and masks is None


def test_refuses_unknown_names_and_numbers_of_other_images() -> None:
    with pytest.raises(ConfigError, match='"spin" is unknown; there are flip'):
        sample(["spin"], PLANAR, 1, np.random.default_rng(0))
    drawn = sample(NAMES, PLANAR, 2, np.random.default_rng(0))
    with pytest.raises(DataError, match="numbers for 2 images"):
        apply(torch.zeros(3, *PLANAR), None, drawn)
    with pytest.raises(DataError, match="do not fit a batch"):
        apply(torch.zeros(2, *SPATIAL), None, drawn)
