"""Data sets of slices, volumes and patches."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import REAL, everything, load, volumes

from fedmed.config import TaskConfig
from fedmed.imaging import decoding
from fedmed.imaging.stored import Tiles, grid


@pytest.fixture(autouse=True)
def _decoding_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process for each of the tests would take longer than the tests."""
    monkeypatch.setattr(decoding, "apart", decoding.here)


def test_slices_repeat_their_patient_labels_and_row(tmp_path: Path) -> None:
    path = volumes(tmp_path, [(3, 6, 5), (5, 6, 5), (2, 7, 5), (4, 6, 6)])
    dataset = load(path, preset="mr", items="slices")
    counts = [3, 5, 2, 4]
    assert dataset.patients == tuple(f"P{i}" for i, count in enumerate(counts) for _ in range(count))
    assert dataset.rows.tolist() == [i + 2 for i, count in enumerate(counts) for _ in range(count)]
    images, targets = everything(dataset)
    assert images.shape == (14, 1, 16, 16) and targets.shape == (14, 2)
    assert targets[:, 0].tolist() == [i % 2 for i, count in enumerate(counts) for _ in range(count)]
    held = [set(dataset.evaluation[dataset.rows == row].tolist()) for row in range(2, 6)]
    assert all(len(side) == 1 for side in held) and dataset.evaluation.any()


@pytest.mark.parametrize("cached", [False, True])
def test_slices_volumes_and_patches_have_masks_of_their_own_shape(tmp_path: Path, cached: bool) -> None:
    path = volumes(tmp_path / "site", [(3, 6, 5), (5, 6, 5)])
    task = TaskConfig(kind="segmentation", labels=("one", "two"))
    options = {"preset": "mr", "volume_size": (4, 4, 4), "cache_dir": tmp_path / "cache" if cached else None}
    for items, count, shape in (("slices", 8, (16, 16)), ("volumes", 2, (4, 4, 4)), ("patches", 12, (4, 4, 4))):
        dataset = load(path, task, items=items, **options)
        images, masks = everything(dataset)
        assert images.shape == (count, 1, *shape) and masks.shape == (count, 2, *shape)
        assert set(masks.unique().tolist()) == {0, 1} and masks.sum(1).max() == 1


@pytest.mark.parametrize("cached", [False, True])
def test_patches_put_together_are_the_volume_and_its_mask(tmp_path: Path, cached: bool) -> None:
    path = volumes(tmp_path / "site", [(9, 6, 5), (3, 11, 8)])
    options = {"preset": "mr", "volume_size": (4, 4, 6), "cache_dir": tmp_path / "cache" if cached else None}
    task = TaskConfig(kind="segmentation", labels=("one", "two"))
    dataset = load(path, task, items="patches", **options)
    tiles = dataset.tiles
    assert tiles is not None and isinstance(dataset.images, Tiles)
    images, masks = everything(dataset)
    for row, number in ((2, 0), (3, 1)):
        whole = dataset.images.volumes[number][0] / 65535
        shape = tuple(tiles.whole[tiles.volume == row][0])
        assert shape == whole.shape
        padded = np.maximum(shape, (4, 4, 6))
        together, times, mask = np.zeros(padded), np.zeros(padded), np.zeros((2, *padded))
        for item in np.flatnonzero(tiles.volume == row):
            box = tuple(slice(low, low + side) for low, side in zip(tiles.corner[item], (4, 4, 6), strict=True))
            together[box] += images[item, 0].numpy()
            times[box] += 1
            mask[(slice(None), *box)] = masks[item].numpy()
        assert times.min() >= 1
        inside = tuple(slice(0, side) for side in shape)
        np.testing.assert_allclose((together / times)[inside], whole, atol=1e-6)
        outside = np.ones(padded, bool)
        outside[inside] = False
        assert not together[outside].any() and not mask[:, outside].any()
        classes = dataset.targets.volumes[number][0]
        np.testing.assert_array_equal(mask[(slice(None), *inside)], classes == np.array([1, 2]).reshape(2, 1, 1, 1))


@given(length=st.tuples(*[st.integers(1, 40)] * 3), size=st.tuples(*[st.integers(1, 20)] * 3))
def test_a_grid_covers_every_voxel_half_a_box_apart_and_stays_inside(
    length: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    corners = grid(length, size)
    assert len({tuple(corner) for corner in corners.tolist()}) == len(corners)
    for axis, (long, side) in enumerate(zip(length, size, strict=True)):
        starts = sorted(set(corners[:, axis].tolist()))
        assert starts[0] == 0 and starts[-1] == max(long - side, 0)
        assert all(0 < after - before <= max(1, side // 2) for before, after in itertools.pairwise(starts))


def test_training_may_move_patches_a_little_and_their_masks_with_them(tmp_path: Path) -> None:
    path = volumes(tmp_path, [(16, 16, 16), (9, 16, 12)])
    task = TaskConfig(kind="segmentation", labels=("one", "two"))
    dataset = load(path, task, preset="mr", items="patches", volume_size=(8, 8, 8))
    rows = np.arange(len(dataset))
    plain = dataset.batch(rows)
    one, again, other = (dataset.batch(rows, generator=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], plain[0])
    for images in (one[0], other[0]):
        assert images.amin((1, 2, 3, 4)).gt(0).any()
    assert isinstance(dataset.images, Tiles)
    corners = dataset.images.jittered(rows, np.random.default_rng(1))
    assert np.abs(corners - dataset.images.corner).max() <= 2
    for item in (0, len(rows) - 1):
        (d, h, w), number = corners[item], dataset.images.volume[item]
        box = (0, slice(d, d + 8), slice(h, h + 8), slice(w, w + 8))
        np.testing.assert_allclose(one[0][item, 0], dataset.images.volumes[number][box] / 65535, atol=1e-6)
        np.testing.assert_array_equal(one[1][item, 0], dataset.targets.volumes[number][box] == 1)


def test_selected_patches_keep_their_places(tmp_path: Path) -> None:
    dataset = load(volumes(tmp_path, [(9, 6, 5), (3, 11, 8)]), preset="mr", items="patches", volume_size=(4, 4, 6))
    keep = np.arange(len(dataset)) % 3 == 1
    part, tiles = dataset.select(keep), dataset.tiles
    assert part.tiles is not None and tiles is not None
    for name in ("volume", "corner", "whole"):
        np.testing.assert_array_equal(getattr(part.tiles, name), getattr(tiles, name)[keep])
    assert torch.equal(everything(part)[0], dataset.batch(np.flatnonzero(keep))[0])


def test_three_dimensional_grey_is_repeated_for_a_network_of_two_channels(tmp_path: Path) -> None:
    dataset = load(volumes(tmp_path, [(4, 4, 4)] * 2), preset="mr", items="volumes", volume_size=(4, 4, 4),
                   in_channels=2)  # fmt: skip
    assert everything(dataset)[0].shape == (2, 2, 4, 4, 4)


@pytest.mark.skipif(not (REAL / "vol3d").is_dir(), reason="the real volumes are not on this machine")
@pytest.mark.parametrize("items", ["slices", "volumes", "patches"])
def test_real_volumes_become_items_with_masks_of_their_labels(tmp_path: Path, items: str) -> None:
    with (REAL / "vol3d" / "dev" / "metadata.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "msd_hippocampus"][:12]
    lines = [f"{row['patient_id']},{REAL / 'vol3d' / row['image']},{REAL / 'vol3d' / row['label']}" for row in rows]
    (tmp_path / "manifest.csv").write_text("\n".join(["patient_id,image,mask", *lines]))
    task = TaskConfig(kind="segmentation", labels=("anterior", "posterior"))
    options = {"preset": "mr", "items": items, "image_size": 48, "volume_size": (32, 48, 32)}
    dataset = load(tmp_path / "manifest.csv", task, cache_dir=tmp_path / "cache", **options)
    assert not dataset.unreadable and len(set(dataset.rows.tolist())) == len(rows) == 12
    images, masks = dataset.batch(np.arange(len(dataset)))
    assert images.min() == 0 and images.max() == 1 and 0.1 < images.mean() < 0.6
    assert masks.sum(1).max() == 1 and masks.sum(tuple(i for i in range(masks.ndim) if i != 1)).min() > 500
    inside = masks.amax(1, keepdim=True) > 0
    for axis in range(2, images.ndim):  # one tissue where the mask lies, several where it does not
        assert images[inside].std() < 0.9 * images[inside.roll(8, axis)].std()


@pytest.mark.skipif(not (REAL / "dicom" / "dev").is_dir(), reason="the real series are not on this machine")
def test_real_series_are_read_or_left_out_with_a_reason(tmp_path: Path) -> None:
    folders = sorted(folder for folder in (REAL / "dicom" / "dev" / "series").iterdir() if folder.is_dir())
    lines = [f"P{number},{folder},1,0" for number, folder in enumerate(folders)]
    (tmp_path / "manifest.csv").write_text("\n".join(["patient_id,image,a,b", *lines]))
    dataset = load(tmp_path / "manifest.csv", preset="mr", items="slices", max_unreadable=0.9)
    assert sum(dataset.reasons.values()) == len(dataset.unreadable) > 0
    assert len(set(dataset.rows.tolist())) == len(folders) - len(dataset.unreadable) > 0
    number = next(n for n, folder in enumerate(folders) if "epi_interleaved" in folder.name)
    assert number + 2 in dataset.unreadable  # several time points at one place are no volume
    assert everything(dataset)[0].amax((1, 2, 3)).median() > 0.5
