"""Small sets of images and volumes as a site has them, and how the tests load them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedmed.config import TaskConfig
from fedmed.imaging import decoding
from fedmed.imaging.cache import upkeep
from fedmed.imaging.dataset import Dataset, load_dataset
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.volume import Volume

LABELS = TaskConfig(labels=("a", "b"))
LUNG = TaskConfig(kind="segmentation", labels=("lung",))
THREE = TaskConfig(kind="segmentation", labels=("left", "right", "heart"))
REAL = Path(__file__).parents[2] / "shared" / "data"  # kept apart from the project; see its README


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


def assert_equal(one: Dataset, two: Dataset) -> None:
    assert (one.unreadable, one.patients, dict(one.reasons)) == (two.unreadable, two.patients, dict(two.reasons))
    for a, b in zip(everything(one), everything(two), strict=True):
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))


def folder_of(cache: Path) -> Path:
    return cache / upkeep.FOLDER


def segments(cache: Path) -> list[Path]:
    return sorted(path for path in folder_of(cache).iterdir() if upkeep.SEGMENT_FILE.fullmatch(path.name))


class Count:
    """How many rows were decoded."""

    rows = 0


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Decode in this process, and count the rows."""
    count = Count()

    @contextlib.contextmanager
    def here(recipe):
        with decoding.here(recipe) as decode:

            def one(row):
                count.rows += 1
                return decode(row)

            yield one

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoding, "apart", here)
        yield count
