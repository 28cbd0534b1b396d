"""The training loop of one site in one round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedmed.config import TrainConfig
from fedmed.errors import DataError
from fedmed.imaging.dataset import Dataset
from fedmed.training.losses import Loss
from fedmed.training.network import FlatNetwork

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training leaves behind besides the weights."""

    loss: float  # mean loss over the steps
    steps: int


def optimizer_for(config: TrainConfig, network: FlatNetwork) -> torch.optim.Optimizer:
    """A fresh optimizer over the network's parameters, fused: one pass over them instead of one per operation."""
    extra: dict[str, float] = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[config.optimizer]
    return make(
        network.module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True, **extra
    )


def batches(
    rows: NDArray[np.int64], config: TrainConfig, generator: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Shuffled batches of row numbers: `local-steps` of them, or `local-epochs` passes with the last batch kept."""
    passes = config.local_epochs if config.local_steps == 0 else 10**9
    left = config.local_steps or 10**9
    for _ in range(passes):
        shuffled = generator.permutation(rows)
        for start in range(0, len(rows), config.batch_size):
            if left == 0:
                return
            left -= 1
            yield shuffled[start : start + config.batch_size]


def train_(
    network: FlatNetwork,
    data: Dataset,
    rows: NDArray[np.int64],
    config: TrainConfig,
    loss: Loss,
    generator: np.random.Generator,
) -> Trained:
    """Train `network` in place on the given rows of `data`.

    Raises:
        DataError: there is no row to train on.
    """
    if len(rows) == 0:
        raise DataError("no image is left to train on", public="no image is left to train on")
    optimizer = optimizer_for(config, network)
    network.module.train()
    total, steps = torch.zeros((), device=network.device), 0
    with torch.random.fork_rng(devices=[] if network.device.type == "cpu" else None):
        torch.manual_seed(int(generator.integers(2**63)))  # dropout inside the network, if it has any
        for chosen in batches(rows, config, generator):
            images, targets = data.batch(chosen)
            optimizer.zero_grad(set_to_none=True)
            value = loss(network.module(images.to(network.device)), targets.to(network.device))
            value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            optimizer.step()
            total += value.detach()
            steps += 1
    return Trained(loss=float(total) / steps, steps=steps)
