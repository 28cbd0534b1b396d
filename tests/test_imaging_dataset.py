"""Data sets: from a manifest to tensors, with unreadable images counted and decoded ones cached."""

from __future__ import annotations

import csv
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedmed.config import TaskConfig
from fedmed.errors import ConfigError, DataError
from fedmed.imaging import decoding
from fedmed.imaging.dataset import Dataset, load_dataset
from fedmed.imaging.stored import Slots, Tiles, grid
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.volume import Volume

LABELS = TaskConfig(labels=("a", "b"))
LUNG = TaskConfig(kind="segmentation", labels=("lung",))
THREE = TaskConfig(kind="segmentation", labels=("left", "right", "heart"))


@pytest.fixture
def processes_apart() -> None:
    """For the tests that are about processes."""


@pytest.fixture(autouse=True)
def _decoding_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Starting a process for each of the others would take longer than the tests."""
    if "processes_apart" not in request.fixturenames:
        monkeypatch.setattr(decoding, "apart", decoding.here)


REAL = Path(__file__).parents[2] / "shared" / "data"  # kept apart from the project; see its README there


def load(path: Path, task: TaskConfig = LABELS, **changes: Any) -> Dataset:
    options: dict[str, Any] = {
        "preset": "cxr", "image_size": 16, "in_channels": 1, "max_unreadable": 0.05, "site_share": 0.25, "seed": 1,
        "name": "site-1", "cache_dir": None,
    }  # fmt: skip
    return load_dataset(path, task=task, **(options | changes))


def site(folder: Path, count: int = 8) -> Path:
    """PNG images of two patients per three files, and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    lines = ["patient_id,image,a,b"]
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 16), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"P{2 * i // 3},{i}.png,{i % 2},{'' if i == 2 else 1}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder / "manifest.csv"


def masked_site(folder: Path, mask: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 20), 100).save(folder / "i.png")
    Image.fromarray(mask).save(folder / "m.png")
    (folder / "manifest.csv").write_text("patient_id,image,mask\nP1,i.png,m.png\n")
    return folder / "manifest.csv"


def volumes(folder: Path, shapes: list[tuple[int, int, int]]) -> Path:
    """NIfTI volumes with masks of two classes, one per patient."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, affine = np.random.default_rng(5), np.eye(4)[[2, 1, 0, 3]]
    lines = ["patient_id,image,mask,a,b"]
    for i, shape in enumerate(shapes):
        write_nifti(Volume(values=rng.random(shape, np.float32), affine=affine), folder / f"{i}.nii.gz")
        write_nifti(Volume(values=rng.integers(0, 3, shape).astype(np.uint8), affine=affine), folder / f"{i}m.nii.gz")
        lines.append(f"P{i},{i}.nii.gz,{i}m.nii.gz,{i % 2},1")
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder / "manifest.csv"


def everything(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    return dataset.batch(np.arange(len(dataset)))


def test_batch_has_images_targets_and_nan_for_unknown(tmp_path: Path) -> None:
    dataset = load(site(tmp_path))
    images, targets = everything(dataset)
    assert images.shape == (8, 1, 16, 16)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(targets[:, 0], torch.arange(8.0) % 2)
    assert torch.isnan(targets[2, 1])
    assert targets[[0, 1, 3], 1].eq(1).all()
    assert dataset.patients == ("P0", "P0", "P1", "P2", "P2", "P3", "P4", "P4")


def test_select_shares_pixels_and_keeps_rows_together(tmp_path: Path) -> None:
    dataset = load(site(tmp_path))
    part = dataset.select(~dataset.evaluation).select(np.arange((~dataset.evaluation).sum()) > 0)
    rows = np.flatnonzero(~dataset.evaluation)[1:]
    assert part.images is dataset.images
    assert not part.evaluation.any()
    assert part.patients == tuple(dataset.patients[row] for row in rows)
    for one, two in zip(everything(part), dataset.batch(rows), strict=True):
        assert torch.equal(one.nan_to_num(9), two.nan_to_num(9))


def test_evaluation_patients_are_apart(tmp_path: Path) -> None:
    dataset = load(site(tmp_path, 30))
    held = {p for p, e in zip(dataset.patients, dataset.evaluation, strict=True) if e}
    assert held
    assert held.isdisjoint(p for p, e in zip(dataset.patients, dataset.evaluation, strict=True) if not e)


def test_grey_is_repeated_for_a_network_of_three_channels(tmp_path: Path) -> None:
    images, _ = everything(load(site(tmp_path), in_channels=3))
    assert images.shape == (8, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])


def test_network_and_preset_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which gives 3"):
        load(site(tmp_path), preset="color", in_channels=1)


def test_empty_batch_and_empty_selection(tmp_path: Path) -> None:
    dataset = load(site(tmp_path))
    assert dataset.batch(np.zeros(0, np.int64))[0].shape == (0, 1, 16, 16)
    assert len(dataset.select(np.zeros(8, bool))) == 0


def test_a_plain_dataset_in_memory_needs_no_more_than_three_values() -> None:
    dataset = Dataset(np.ones((2, 1, 4, 4), np.float32), np.zeros((2, 1), np.float32), ("a", "b"))
    assert not dataset.evaluation.any()
    assert everything(dataset)[0].eq(1).all()
    with pytest.raises(DataError, match="3 patients do not fit 2 images"):
        Dataset(np.ones((2, 1, 4, 4), np.float32), np.zeros((2, 1), np.float32), ("a", "b", "c"))


def test_unreadable_images_are_left_out_and_listed(tmp_path: Path) -> None:
    path = site(tmp_path)
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "5.png").unlink()
    dataset = load(path, max_unreadable=0.25)
    assert dataset.unreadable == (5, 7)
    assert len(dataset) == 6
    assert len(dataset.evaluation) == 6
    whole = everything(load(site(tmp_path / "whole")))[0]
    assert torch.equal(everything(dataset)[0], whole[[0, 1, 2, 4, 6, 7]])


def test_too_many_unreadable_are_refused_with_rows_and_reasons(tmp_path: Path) -> None:
    path = site(tmp_path, 40)
    for name in (2, 7, 9):
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        load(path)
    reason = "neither DICOM, PNG nor JPEG"
    assert str(caught.value) == (
        "3 of 40 images (7.5 %) cannot be read, above data.max-unreadable = 5 %: "
        f"row 4 ({reason}), row 9 ({reason}), row 11 ({reason})"
    )


@pytest.mark.parametrize("cached", [False, True])
def test_nothing_readable_is_refused_whatever_the_share(tmp_path: Path, cached: bool) -> None:
    path = site(tmp_path, 7)
    for name in range(7):
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(DataError, match=r"7 of 7 images \(100.0 %\).*row 6 \(no such file\), …"):
        load(path, max_unreadable=1.0, cache_dir=tmp_path / "cache" if cached else None)


def test_any_nonzero_pixel_is_the_one_label(tmp_path: Path) -> None:
    mask = np.zeros((20, 16), np.uint8)
    mask[5:15, 4:12] = 255
    _, targets = everything(load(masked_site(tmp_path, mask), LUNG))
    assert targets.shape == (1, 1, 16, 16)
    assert set(targets.unique().tolist()) == {0, 1}
    assert abs(targets.sum().item() - 80 * 0.8**2) < 10


def test_several_labels_are_numbered_from_one(tmp_path: Path) -> None:
    mask = np.repeat(np.arange(4, dtype=np.uint8), 5)[:, None].repeat(16, axis=1)
    _, targets = everything(load(masked_site(tmp_path, mask), THREE))
    assert targets.shape == (1, 3, 16, 16)
    assert targets.sum((2, 3)).min() > 0
    assert targets.sum(1).max() == 1


def test_masks_that_do_not_fit_name_their_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 2: the mask is 20 by 15 pixels, its image 20 by 16"):
        load(masked_site(tmp_path / "a", np.zeros((20, 15), np.uint8)), LUNG)
    with pytest.raises(DataError, match="row 2: the mask holds 7, but the task has 3 labels"):
        load(masked_site(tmp_path / "b", np.full((20, 16), 7, np.uint8)), THREE)


def test_a_data_set_says_how_many_rows_it_left_out_and_why(tmp_path: Path) -> None:
    path = site(tmp_path)
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "4.png").write_bytes(b"no picture")
    (tmp_path / "5.png").unlink()
    dataset = load(path, max_unreadable=0.5)
    assert dict(dataset.reasons) == {"neither DICOM, PNG nor JPEG": 2, "no such file": 1}
    assert sum(dataset.reasons.values()) == len(dataset.unreadable) == 3
    assert dataset.rows.tolist() == [2, 3, 4, 8, 9]


def test_no_representation_holds_a_patient(tmp_path: Path) -> None:
    assert "P0" not in repr(load(site(tmp_path)))


def test_sources_of_eight_and_of_sixteen_bits_mix_in_one_batch(tmp_path: Path) -> None:
    path = site(tmp_path)
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "4.png")
    dataset = load(path)
    assert isinstance(dataset.images, Slots)
    assert sorted(source.dtype.name for source in dataset.images.sources) == ["uint16", "uint8"]
    images, _ = dataset.batch(np.array([7, 4, 0, 4]))
    np.testing.assert_allclose(images[1, 0].numpy(), deep / 65535, atol=1e-7)
    assert torch.equal(images[1], images[3])
    for row in (7, 0):
        assert torch.equal(dataset.batch(np.array([row]))[0][0], images[0 if row == 7 else 2])
    assert images.max() <= 1


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


def test_a_generator_changes_nothing_where_items_are_whole(tmp_path: Path) -> None:
    dataset = load(site(tmp_path))
    rows = np.arange(8)
    assert torch.equal(dataset.batch(rows, generator=np.random.default_rng(0))[0], dataset.batch(rows)[0])
    assert dataset.tiles is None


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


def test_masks_given_as_planes_follow_the_order() -> None:
    masks = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(4, 2).repeat(4, 3) % 2
    dataset = Dataset(np.zeros((3, 1, 4, 4), np.float32), masks, ("a", "b", "c"))
    part = dataset.select(np.array([False, True, True]))
    assert part.targets is masks
    assert part.batch(np.array([1, 0]))[1].mean((1, 2, 3)).tolist() == [0, 1]


ABORTING = """
import os
from pathlib import Path
from fedmed.imaging.items import item
def fragile(**settings):
    if Path(settings["image"]).read_bytes() == b"fatal":
        os.abort()
    return item(**settings)
JOBS = {"item": fragile}
"""


@pytest.mark.usefixtures("processes_apart")
def test_a_decoder_that_ends_its_process_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = site(tmp_path)
    (tmp_path / "4.png").write_bytes(b"fatal")
    (tmp_path / "aborting.py").write_text(ABORTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decoding, "DecodingProcess", functools.partial(decoding.DecodingProcess, jobs="aborting"))
    dataset = load(path, max_unreadable=0.5, cache_dir=tmp_path / "cache")
    assert dataset.unreadable == (6,) and dict(dataset.reasons) == {"its decoder crashed": 1}
    Image.new("L", (16, 20), 9).save(tmp_path / "4.png")
    assert load(path, cache_dir=tmp_path / "cache").reasons == {}


@pytest.mark.usefixtures("processes_apart")
def test_several_processes_give_the_same_in_the_same_order(tmp_path: Path) -> None:
    path = site(tmp_path, 12)
    (tmp_path / "3.png").write_bytes(b"")
    two = load(path, max_unreadable=0.5, processes=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoding, "apart", decoding.here)
        one = load(path, max_unreadable=0.5)
    assert torch.equal(everything(one)[0], everything(two)[0])
    assert one.unreadable == two.unreadable == (5,)


@pytest.mark.usefixtures("processes_apart")
def test_an_error_of_the_set_ends_all_its_processes(tmp_path: Path) -> None:
    site(tmp_path, 3)
    (tmp_path / "m.csv").write_text("patient_id,image,mask\n" + "".join(f"P,{i}.png,m.png\n" for i in range(3)))
    Image.new("L", (15, 20)).save(tmp_path / "m.png")
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(DataError, match="row 2: the mask is 20 by 15 pixels"):
        load(tmp_path / "m.csv", LUNG, processes=2)
    assert {child.pid for child in psutil.Process().children()} == before


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
