"""A site's data and networks that take no time: for proofs about the federation and not about images."""

import hashlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedmed.errors import DataError
from fedmed.imaging.dataset import Dataset

LABELS = ("a", "b")
FRAGILE = "FEDMED_TEST_FRAGILE"  # names a file; without it, `fragile` kills its process once and writes it
PLANTED = "PLANTED-IDENTIFIER"  # no outbound byte may hold it


def dataset(reference: Path, config) -> Dataset:
    """`NAME-COUNT`: that many images; a name that starts with a trouble brings it."""
    name, _, count = reference.name.rpartition("-")
    if name.startswith("broken"):
        raise DataError(f"{reference}/{PLANTED}: cannot be read")
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("bug"):
        raise ZeroDivisionError(f"{PLANTED} in {reference}")
    if name.startswith("slow"):
        time.sleep(3600)
    rows = int(count)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    images = rng.random((rows, config.model.in_channels, 8, 8), dtype=np.float32)
    targets = np.stack([images.mean((1, 2, 3)) > 0.5, images[:, 0, 0, 0] > 0.5], axis=1).astype(np.float32)
    if name.startswith("nan"):
        images[:] = np.nan
    patients = tuple(f"{PLANTED}-{name}-{row // 2}" for row in range(rows))
    held = np.array([row % 10 >= 8 for row in range(rows)]) if config.evaluate.site_share else np.zeros(rows, bool)
    return Dataset(images=images, targets=targets, patients=patients, evaluation=held)


def network(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    norms = {"group": lambda: nn.GroupNorm(2, 4), "batch": lambda: nn.BatchNorm2d(4), "instance": nn.Identity}
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), norms[norm](), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, outputs)
    )


def heavy(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """`width` thousand parameters and no computation: for memory and kills."""

    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ballast = nn.Parameter(torch.zeros(width * 1000))
            self.head = nn.Linear(in_channels * 64, outputs)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(images.flatten(1)) + self.ballast[0]

    return Heavy()


def fragile(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """A network whose fifteenth batch in training kills the process, once."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(in_channels=in_channels, outputs=outputs, norm=norm, width=width)
            self.seen = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            marker = os.environ.get(FRAGILE)
            self.seen += self.training
            if marker and self.seen == 15 and not Path(marker).exists():
                Path(marker).write_text("killed")
                os.kill(os.getpid(), signal.SIGKILL)
            return self.inner(images)

    return Fragile()


def hanging(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """A network that never answers."""

    class Hanging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(in_channels=in_channels, outputs=outputs, norm=norm, width=width)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            time.sleep(3600)
            return self.inner(images)

    return Hanging()


def greedy(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """A network that takes 4 GiB for its activations."""

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(in_channels=in_channels, outputs=outputs, norm=norm, width=width)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images) + torch.ones(2**30)[0] * 0

    return Greedy()


def slow(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """A network that takes a tenth of a second for every batch that it learns from."""

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(in_channels=in_channels, outputs=outputs, norm=norm, width=width)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            time.sleep(0.1 * self.training)
            return self.inner(images)

    return Slow()
