"""The training loop of one site in one round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that a network draws from, and put them back afterwards.

    `torch.random.fork_rng` and `torch.manual_seed` do the same for every device that there might be, in half a
    millisecond: as much as a step of a small network.
    """
    cuda = [torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []
    generators = [torch.default_generator, *cuda]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


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
    with seeded(int(generator.integers(2**63)), network.device):  # dropout inside the network, if it has any
        for chosen in batches(rows, config, generator):
            images, targets = data.batch(chosen)
            optimizer.zero_grad(set_to_none=True)
            value = loss(network.module(images.to(network.device)), targets.to(network.device))
            value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            optimizer.step()
            total += value.detach()
            steps += 1
    optimizer.zero_grad(set_to_none=True)  # their memory serves the copy of the weights that leaves now
    return Trained(loss=float(total) / steps, steps=steps)
