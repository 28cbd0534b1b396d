"""Data sets: from a manifest to tensors, with unreadable images counted and decoded ones cached."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedmed.config import TaskConfig
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.dataset import Dataset, load_dataset

LABELS = TaskConfig(labels=("a", "b"))
LUNG = TaskConfig(kind="segmentation", labels=("lung",))
THREE = TaskConfig(kind="segmentation", labels=("left", "right", "heart"))


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


def test_cache_gives_the_same_and_is_used(tmp_path: Path) -> None:
    path, cache = site(tmp_path / "site"), tmp_path / "cache"
    (tmp_path / "site/3.png").write_bytes(b"")
    plain = load(path, max_unreadable=0.5)
    first, second = (load(path, max_unreadable=0.5, cache_dir=cache) for _ in range(2))
    for dataset in (first, second):
        assert isinstance(dataset.images, np.memmap)
        assert dataset.unreadable == plain.unreadable == (5,)
        for one, two in zip(everything(dataset), everything(plain), strict=True):
            assert torch.equal(one.nan_to_num(9), two.nan_to_num(9))
    (folder,) = cache.iterdir()
    assert folder.stat().st_mode & 0o077 == 0  # pixels are for their owner alone


def test_masks_are_cached_too(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (20, 16)).astype(np.uint8)
    path = masked_site(tmp_path / "site", mask)
    plain, cached = everything(load(path, LUNG)), everything(load(path, LUNG, cache_dir=tmp_path / "cache"))
    assert torch.equal(plain[1], cached[1])
    assert torch.equal(plain[0], cached[0])


def test_a_changed_file_size_or_setting_is_another_cache(tmp_path: Path) -> None:
    path, cache = site(tmp_path / "site"), tmp_path / "cache"
    load(path, cache_dir=cache)
    load(path, cache_dir=cache, seed=5, site_share=0.5)  # neither touches pixels
    assert len(list(cache.iterdir())) == 1
    load(path, cache_dir=cache, image_size=8)
    assert len(list(cache.iterdir())) == 2
    os.utime(tmp_path / "site/0.png", ns=(1, 1))
    load(path, cache_dir=cache)
    assert len(list(cache.iterdir())) == 3


def test_a_moved_site_keeps_its_cache(tmp_path: Path) -> None:
    load(site(tmp_path / "one"), cache_dir=tmp_path / "cache")
    shutil.move(tmp_path / "one", tmp_path / "two")
    load(tmp_path / "two/manifest.csv", cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_damaged_cache_says_what_to_do(tmp_path: Path) -> None:
    path, cache = site(tmp_path / "site"), tmp_path / "cache"
    load(path, cache_dir=cache)
    (folder,) = cache.iterdir()
    (folder / "images.raw").write_bytes(b"")
    with pytest.raises(DataError, match="image cache cannot be used"):
        load(path, cache_dir=cache)


def test_cache_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="image cache cannot be used"):
        load(site(tmp_path / "site"), cache_dir=tmp_path / "file")


def _load_after(barrier: Any, path: Path, cache: Path) -> None:
    barrier.wait(20)
    assert len(load(path, cache_dir=cache)) == 60


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    path, cache = site(tmp_path / "site", 60), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_load_after, args=(barrier, path, cache)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(cache.iterdir())) == 1


KILLED = """
import sys, time
from pathlib import Path
import fedmed.imaging.dataset as dataset
from tests.test_imaging_dataset import load
slow = dataset.read_image
def read_image(path, *, preset):
    print("reading", flush=True)
    time.sleep(0.2)
    return slow(path, preset=preset)
dataset.read_image = read_image
load(Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))
"""


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    path, cache = site(tmp_path / "site"), tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(cache)], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    (left,) = cache.iterdir()
    assert left.name.startswith("building-")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (long_ago, long_ago))
    assert len(load(path, cache_dir=cache)) == 8
    assert not left.exists()
    assert len(list(cache.iterdir())) == 1
