"""The work that every engine is timed on: data, networks and sizes. Kept apart so that workers import nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from fedmed.config import RunConfig
from fedmed.imaging.dataset import Dataset


@dataclass(frozen=True)
class Work:
    """One comparison: so many hospitals, each with so many steps of so many images in every round."""

    network: str
    channels: int
    labels: int
    pixels: int
    sites: int
    steps: int
    batch: int
    learning_rate: float
    rounds: tuple[int, int]  # a short and a long run; a steady round is their difference


WORKS = {
    "small-cnn-32": Work("work:small_cnn", 1, 2, 28, 32, 4, 16, 0.05, (5, 65)),
    "densenet121-8": Work("work:densenet121", 1, 14, 64, 8, 2, 8, 0.01, (2, 12)),
}


def dataset(reference: Path, config: RunConfig) -> Dataset:
    """Random images of one hospital; `WORK-NUMBER`, or `WORK-server` for the server's own set.

    With `evaluate.site-share` a batch more is held out, so that every run trains on the same images.
    """
    name, _, number = reference.name.rpartition("-")
    work = WORKS[name]
    server = number == "server"
    rng = np.random.default_rng(10_000 if server else int(number))
    rows = 256 if server else work.steps * work.batch
    images = rng.standard_normal((rows, work.channels, work.pixels, work.pixels), dtype=np.float32)
    targets = (rng.random((rows, work.labels)) < 0.3).astype(np.float32)
    held = work.batch if config.evaluate.site_share else 0
    if held:
        more = rng.standard_normal((held, work.channels, work.pixels, work.pixels), dtype=np.float32)
        images = np.concatenate([images, more])
        targets = np.concatenate([targets, (rng.random((held, work.labels)) < 0.3).astype(np.float32)])
    patients = tuple(str(row) for row in range(rows + held))
    return Dataset(images=images, targets=targets, patients=patients, evaluation=np.arange(rows + held) >= rows)


def small_cnn(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """A CNN of 5 thousand parameters, so small that an engine's own time shows."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, outputs),
    )


def densenet121(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """Fedmed's own DenseNet-121 with GroupNorm, on both sides of the comparison."""
    from fedmed.models.chexnet import chexnet

    return chexnet(in_channels=in_channels, outputs=outputs, norm="group", width=0)
