"""Volumes keep their place in the patient when they are turned, resampled, cropped and padded."""

from dataclasses import replace
from itertools import product

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from nibabel.orientations import aff2axcodes, ornt_transform
from nibabel.processing import resample_from_to

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes.resample import cropped_or_padded, onto, recentred, resampled
from fedmed.imaging.volumes.volume import Volume, canonical, in_order_of, like

REVERSED = np.eye(4)[[2, 1, 0, 3]]
sizes = st.tuples(*[st.integers(1, 7)] * 3)
spacings = st.tuples(*[st.floats(0.3, 6)] * 3)


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        part = np.eye(3)
        one, other = (axis + 1) % 3, (axis + 2) % 3
        part[one, one] = part[other, other] = np.cos(angle)
        part[one, other], part[other, one] = -np.sin(angle), np.sin(angle)
        turned = turned @ part
    return turned


@st.composite
def volumes(draw: st.DrawFn, labels: bool = False) -> Volume:
    shape, spacing = draw(sizes), draw(spacings)
    signs = np.diag(draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)))
    axes = np.eye(3)[list(draw(st.permutations(range(3))))]
    affine = np.eye(4)
    affine[:3, :3] = rotation(draw(st.tuples(*[st.floats(-0.5, 0.5)] * 3))) @ axes @ signs @ np.diag(spacing)
    affine[:3, 3] = draw(st.tuples(*[st.floats(-200, 200)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.choice([0, 3, 7], shape) if labels else rng.normal(0, 100, shape).astype(np.float32)
    return Volume(values=values, affine=affine, padding=None if labels else rng.random(shape) < 0.1, modality="MR")


def as_nifti(volume: Volume) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(volume.values.transpose(2, 1, 0).astype(np.float32), volume.affine @ REVERSED)


def voxels(volume: Volume) -> list[tuple[float, ...]]:
    """(x, y, z, value, padding) of every voxel, sorted."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1).reshape(-1, 3)
    padding = np.zeros(volume.shape, bool) if volume.padding is None else volume.padding
    rows = np.column_stack([apply_affine(volume.affine, index).round(3), volume.values.ravel(), padding.ravel()])
    return sorted(map(tuple, (rows + 0.0).tolist()))


@given(volumes())
@settings(max_examples=60, deadline=None)
def test_canonical_moves_no_voxel_and_agrees_with_nibabel(volume: Volume):
    turned = canonical(volume)
    np.testing.assert_allclose(voxels(turned), voxels(volume), atol=2e-3)
    theirs = nibabel.as_closest_canonical(as_nifti(volume))
    assert (theirs.get_fdata(dtype=np.float32).transpose(2, 1, 0) == turned.values).all()
    np.testing.assert_allclose(theirs.affine @ REVERSED, turned.affine, atol=1e-3)


@given(volumes())
@settings(max_examples=40, deadline=None)
def test_canonical_is_idempotent(volume: Volume):
    once = canonical(volume)
    twice = canonical(once)
    assert (twice.values == once.values).all() and (twice.affine == once.affine).all()
    assert (twice.padding == once.padding).all()


@given(volumes())
def test_the_axes_of_another_volume_bring_every_voxel_back_to_its_place(volume: Volume):
    other = in_order_of(canonical(volume), volume)
    assert (other.values == volume.values).all() and like(other, volume)
    coarser = replace(volume, affine=volume.affine @ np.diag([3.0, 1.0, 1.0, 1.0]))
    assert in_order_of(coarser, volume) is coarser


def test_every_orientation_becomes_head_front_right():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    upright = Volume(values=values, affine=np.diag([3.0, 2.0, 1.0, 1.0]) @ REVERSED)
    upright = canonical(upright)
    seen = set()
    for codes in product("LR", "AP", "IS"):
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            target = "".join(codes[axis] for axis in order)
            change = ornt_transform(
                nibabel.io_orientation(upright.affine @ REVERSED), nibabel.orientations.axcodes2ornt(target)
            )
            image = as_nifti(upright).as_reoriented(change)
            assert "".join(aff2axcodes(image.affine)) == target
            turned = canonical(
                Volume(values=image.get_fdata(dtype=np.float32).transpose(2, 1, 0), affine=image.affine @ REVERSED)
            )
            assert (turned.values == upright.values).all() and np.allclose(turned.affine, upright.affine)
            seen.add(target)
    assert len(seen) == 48


@given(volumes(), spacings)
@settings(max_examples=40, deadline=None)
def test_resampling_keeps_centre_extent_and_range(volume: Volume, spacing: tuple[float, float, float]):
    other = resampled(volume, spacing)
    np.testing.assert_allclose(other.spacing_mm, spacing, rtol=1e-5)
    middles = [one.affine @ [*((np.array(one.shape) - 1) / 2), 1] for one in (volume, other)]
    np.testing.assert_allclose(*middles, atol=1e-6)
    extents = [np.array(one.shape) * one.spacing_mm for one in (volume, other)]
    assert (np.abs(extents[0] - extents[1]) <= np.maximum(other.spacing_mm, 1e-6) * 1.0001).all()
    low, high = volume.values.min(), volume.values.max()
    assert other.values.min() >= low - 1e-3 and other.values.max() <= high + 1e-3
    assert other.values.dtype == np.float32


@given(volumes(labels=True), spacings)
@settings(max_examples=40, deadline=None)
def test_resampling_labels_invents_none(volume: Volume, spacing: tuple[float, float, float]):
    other = resampled(volume, spacing, labels=True)
    assert set(np.unique(other.values)) <= set(np.unique(volume.values)) and other.values.dtype == volume.values.dtype


@given(volumes())
@settings(max_examples=30, deadline=None)
def test_resampling_to_its_own_spacing_or_grid_changes_nothing(volume: Volume):
    assert (resampled(volume, volume.spacing_mm).values == volume.values).all()
    same = onto(volume, volume)
    filled = np.where(volume.padding, volume.values.min(), volume.values)
    np.testing.assert_allclose(same.values, filled, atol=1e-3)
    assert volume.padding is not None
    assert (same.padding == volume.padding).all() if volume.padding.any() else same.padding is None


@given(volumes(labels=True), volumes())
@settings(max_examples=30, deadline=None)
def test_labels_on_another_grid_come_from_the_voxel_that_holds_the_point(volume: Volume, target: Volume):
    target = replace(target, affine=target.affine - np.pad((target.affine - volume.affine)[:3, 3:], ((0, 1), (3, 0))))
    other = onto(volume, target, labels=True)
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), -1).reshape(-1, 3)
    exact = apply_affine(np.linalg.inv(volume.affine) @ target.affine, index)
    clear = (np.abs(exact - np.floor(exact) - 0.5) > 1e-4).all(axis=1)  # not on a border of two voxels
    nearest = np.rint(exact).astype(int)
    inside = ((nearest >= 0) & (nearest < volume.shape)).all(axis=1)
    expected = np.zeros(len(index), volume.values.dtype)
    expected[inside] = volume.values[tuple(nearest[inside].T)]
    assert (other.values.ravel()[clear] == expected[clear]).all()


def smooth(affine: np.ndarray, shape: tuple[int, int, int] = (20, 24, 22)) -> Volume:
    """A volume whose values are a linear function of the place in the patient."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(apply_affine(affine, index), -1, 0)
    return Volume(values=(2 * x - 3 * y + 0.5 * z).astype(np.float32), affine=affine)


def test_an_oblique_grid_gets_the_values_of_its_places():
    source = smooth(np.diag([2.0, 1.0, 1.5, 1.0]))
    turned = np.eye(4)
    turned[:3, :3] = rotation((0.3, -0.2, 0.4)) * 1.2
    turned[:3, 3] = [12, 8, 10]
    target = smooth(turned, (6, 7, 5))
    other = onto(source, target)
    assert other.padding is None
    np.testing.assert_allclose(other.values, target.values, atol=1e-2)
    theirs = resample_from_to(as_nifti(source), ((5, 7, 6), turned @ REVERSED), order=1)
    np.testing.assert_allclose(other.values, theirs.get_fdata().transpose(2, 1, 0), atol=1e-2)


def test_beyond_the_field_of_view_an_image_is_padding_and_labels_are_background():
    source = smooth(np.eye(4), (4, 4, 4))
    shifted = np.eye(4)
    shifted[0, 3] = 2
    target = replace(source, affine=shifted)
    image = onto(source, target)
    assert image.padding is not None and (image.padding == (np.arange(4) > 1)[:, None, None]).all()
    assert (image.values[image.padding] == source.values.min()).all()
    labels = onto(replace(source, values=np.ones((4, 4, 4), np.int64)), target, labels=True)
    assert (labels.values == (np.arange(4) < 2)[:, None, None]).all() and labels.padding is None


def test_what_becomes_coarser_is_blurred_against_aliasing():
    stripes = np.zeros((8, 8, 63), np.float32)
    stripes[..., ::2] = 1  # finer than the new grid can show: its samples fall on 0 and 1 in turn
    coarse = resampled(Volume(values=stripes, affine=np.eye(4)), (1, 1, 3)).values
    assert np.abs(coarse[..., 2:-2] - 0.5).max() < 0.01
    sums = []
    for place in (30, 31, 32):  # wherever a vessel lies, it leaves a trace, and on average as much as it has
        impulse = np.zeros((1, 1, 63), np.float32)
        impulse[..., place] = 1
        sums.append(3 * resampled(Volume(values=impulse, affine=np.eye(4)), (1, 1, 3)).values.sum())
    assert min(sums) > 0.8 and np.mean(sums) == pytest.approx(1, abs=0.01)


def test_refuses_to_resample_into_more_than_memory_holds():
    volume = Volume(values=np.zeros((4, 4, 4), np.float32), affine=np.eye(4))
    with pytest.raises(UnreadableImage, match="million voxels"):
        resampled(volume, (1e-4, 1e-4, 1e-4))
    for wrong in ((0, 1, 1), (1, 1), (1, 1, float("nan"))):
        with pytest.raises(ValueError, match="three positive numbers"):
            resampled(volume, wrong)


@given(volumes(), sizes)
@settings(max_examples=50, deadline=None)
def test_cropping_and_padding_keep_the_middle_in_its_place(volume: Volume, size: tuple[int, int, int]):
    framed = recentred(volume, size, fill=-9999)
    assert framed.shape == size
    kept = {voxel for voxel in voxels(framed) if voxel[3] != -9999}
    overlap = np.prod(np.minimum(size, volume.shape))
    assert len(kept) == overlap
    ours, whole = sorted(kept), voxels(volume)
    values = {voxel[3]: voxel for voxel in whole}
    np.testing.assert_allclose([values[voxel[3]] for voxel in ours], ours, atol=2e-3)
    assert (framed.values == cropped_or_padded(volume.values[None], size, fill=-9999)[0]).all()


def test_cropping_undoes_padding():
    array = np.random.default_rng(0).integers(0, 9, (2, 3, 4, 5))
    for size in product((3, 4, 7), (4, 5, 9), (5, 6, 8)):
        assert (cropped_or_padded(cropped_or_padded(array, size), (3, 4, 5)) == array).all()


def test_grids_are_like_within_rounding_and_unlike_half_a_voxel_away():
    volume = smooth(np.diag([2.0, 1.0, 1.5, 1.0]))
    rounded = replace(volume, affine=volume.affine.astype(np.float32).astype(np.float64) + 1e-5 * np.eye(4, k=1))
    shifted, stretched = volume.affine.copy(), volume.affine.copy()
    shifted[0, 3] += 1
    stretched[1, 1] *= 1.005
    assert like(volume, volume) and like(rounded, volume)
    assert not like(replace(volume, affine=shifted), volume)
    assert not like(replace(volume, affine=stretched), volume)
    assert not like(smooth(volume.affine, (20, 24, 21)), volume)


@pytest.mark.parametrize(
    "change",
    [
        {"values": np.zeros((3, 4))},
        {"values": np.zeros((0, 3, 4))},
        {"padding": np.zeros((2, 2, 2), bool)},
        {"affine": np.diag([1.0, 0.0, 1.0, 1.0])},
        {"affine": np.diag([1.0, np.nan, 1.0, 1.0])},
        {"affine": np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])},
        {"affine": np.diag([1.0, 1.0, 1.0, 2.0])},
    ],
)
def test_refuses_what_is_no_volume(change: dict[str, np.ndarray]):
    with pytest.raises(UnreadableImage):
        replace(smooth(np.eye(4), (2, 3, 4)), **change)
