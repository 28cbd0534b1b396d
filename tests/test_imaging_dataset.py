"""Data sets: from a manifest to tensors, with unreadable images counted."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from image_sets import LUNG, THREE, everything, load, masked_site, site
from PIL import Image

from fedmed.errors import ConfigError, DataError
from fedmed.imaging import decoding
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.stored import Slots


@pytest.fixture
def processes_apart() -> None:
    """For the tests that are about processes."""


@pytest.fixture(autouse=True)
def _decoding_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Starting a process for each of the others would take longer than the tests."""
    if "processes_apart" not in request.fixturenames:
        monkeypatch.setattr(decoding, "apart", decoding.here)


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


def test_a_generator_changes_nothing_where_items_are_whole(tmp_path: Path) -> None:
    dataset = load(site(tmp_path))
    rows = np.arange(8)
    assert torch.equal(dataset.batch(rows, generator=np.random.default_rng(0))[0], dataset.batch(rows)[0])
    assert dataset.tiles is None


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
