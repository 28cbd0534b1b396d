"""The training loop of one site in one round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmed.config import TrainConfig
from fedmed.errors import DataError
from fedmed.imaging import augment
from fedmed.imaging.dataset import Dataset
from fedmed.models.stages import parameter_groups
from fedmed.training.gradients import Correction
from fedmed.training.losses import Loss, deeply_supervised
from fedmed.training.network import FlatNetwork
from fedmed.training.precision import settled
from fedmed.training.sampling import Rows, batches, batches_in_a_pass
from fedmed.training.schedule import learning_rate_factor
from fedmed.training.unfinished import Unfinished
from fedmed.types import FloatVector

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
Batch = tuple[Tensor, Tensor]
AnyLoss = Callable[[Tensor | tuple[Tensor, ...], Tensor], Tensor]  # of logits, or of several sizes of them


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training leaves behind besides the weights."""

    loss: float  # mean loss over the steps
    steps: int
    kept: Mapping[str, FloatVector] = field(default_factory=dict)  # what the site keeps of it for its next round


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What besides data and settings decides how a round is trained."""

    round: int = 1
    plateau: float = 1.0  # factor of the learning rate that the server has come to
    weights: NDArray[np.float64] | None = None  # (n,) chances of the rows; None = each once in every pass
    unfinished: Unfinished | None = None  # where a long round is saved
    validation: Callable[[], float] | None = None  # loss on patients that are held out, for local early stopping
    correction: Correction | None = None  # of the gradient, before every step of the optimizer


def optimizer_for(config: TrainConfig, network: FlatNetwork) -> torch.optim.Optimizer:
    """A fresh optimizer over the trainable parameters, fused: one pass over them instead of one per operation."""
    extra: dict[str, float] = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[config.optimizer]
    return make(
        parameter_groups(network.module, learning_rate=config.learning_rate, decay=config.layer_decay)
        if config.layer_decay < 1
        else [parameter for parameter in network.module.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
        **extra,
    )


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
    rows: Rows,
    config: TrainConfig,
    loss: Loss,
    generator: np.random.Generator,
    given: Circumstances | None = None,
) -> Trained:
    """Train `network` in place on the given rows of `data`.

    Raises:
        DataError: there is no row to train on.
    """
    if len(rows) == 0:
        raise DataError("no image is left to train on", public="no image is left to train on")
    given = given or Circumstances()
    seed = int(generator.integers(2**63))
    order = list(batches(rows, config, generator, given.weights))
    with seeded(seed, network.device):  # dropout inside the network, if it has any
        training = Training(network, config, given, -(-len(order) // config.accumulate))
        training.take_up()
        supervised = deeply_supervised(loss)
        first = training.step * config.accumulate
        network.module.train()
        numbered = enumerate(order[first:], start=first)
        parts = (training_batch(data, chosen, config, (seed, number)) for number, chosen in numbered)
        while group := list(islice(parts, config.accumulate)):
            training.step_(partial(_mean_gradient_, network, config, supervised, group))
            if training.over(at_end_of_pass=_ends_a_pass(training.step, rows, config)):
                break
    return training.result_()


def training_batch(data: Dataset, chosen: Rows, config: TrainConfig, seed: tuple[int, ...]) -> Batch:
    """Images and targets of a step, changed at random if the run asks for it; the change depends on the seed alone."""
    if not config.augment:
        return data.batch(chosen)
    generator = np.random.default_rng(seed)
    images, targets = data.batch(chosen, generator=generator)
    drawn = augment.sample(config.augment, images.shape[1:], len(images), generator)
    if targets.ndim == images.ndim:
        return augment.apply(images, targets, drawn)
    return augment.apply(images, None, drawn)[0], targets


def _mean_gradient_(network: FlatNetwork, config: TrainConfig, loss: AnyLoss, group: Sequence[Batch]) -> Tensor:
    """Leave the gradient of the mean loss over some batches, each weighing as many images as it has; give that loss."""
    device = network.device
    half = torch.autocast(device.type, torch.bfloat16, enabled=settled(config.precision, device) == "bfloat16")
    images_in_all, total = sum(len(images) for images, _ in group), torch.zeros((), device=device)
    for parameter in network.parameters:
        parameter.grad = None
    for images, targets in group:
        with half:
            outputs = network(images.to(device), channels_last=config.channels_last)
        value = loss(outputs, targets.to(device)) * (len(images) / images_in_all)
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        total += value.detach()
    return total


def _ends_a_pass(step: int, rows: Rows, config: TrainConfig) -> bool:
    return config.local_steps == 0 and step * config.accumulate % batches_in_a_pass(rows, config) == 0


class Training:
    """The state of one round's training: the network, its optimizer, and what has been seen so far."""

    def __init__(self, network: FlatNetwork, config: TrainConfig, given: Circumstances, steps: int) -> None:
        """Begin with a fresh optimizer; `steps` are what the schedule is laid over."""
        self.network, self.config, self.given, self.steps = network, config, given, steps
        self.optimizer = optimizer_for(config, network)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.total, self.step = torch.zeros((), device=network.device), 0
        self.average = network.vector.clone() if config.ema else None
        self.best: tuple[float, Tensor] | None = None  # validation loss and weights of the best pass
        self.stale = 0
        self.clip = 0.0  # the bound that adaptive clipping has come to; 0 = that of the round's beginning

    def step_(self, gradient_: Callable[[], Tensor]) -> None:
        """One optimizer step on the gradient that a function leaves in the parameters; it gives the loss, a scalar."""
        self._set_learning_rate()
        self.total += gradient_()
        if self.given.correction is not None:
            self.given.correction()
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.lerp_(self.network.vector, 1 - self.config.ema)

    def over(self, *, at_end_of_pass: bool) -> bool:
        """Save if it is time to, and say whether the round is to end early."""
        if at_end_of_pass and self.config.patience and self.given.validation is not None:
            value = self.given.validation()
            self.network.module.train()
            if self.best is None or value < self.best[0]:
                self.best, self.stale = (value, self.network.vector.clone()), 0
            else:
                self.stale += 1
        if self.given.unfinished is not None and self.given.unfinished.due and self.step < self.steps:
            self.given.unfinished.save(*self._state())
        return 0 < self.config.patience <= self.stale

    def result_(self) -> Trained:
        """Leave the network with the weights that the site is to send."""
        self.optimizer.zero_grad(set_to_none=True)  # their memory serves the copy of the weights that leaves now
        if self.best is not None:
            self.network.vector.copy_(self.best[1])
        elif self.average is not None:
            self.network.vector.copy_(self.average)
        return Trained(loss=float(self.total) / self.step, steps=self.step)

    def take_up(self) -> None:
        """Go on where a process of this round was killed, if there was one."""
        saved = self.given.unfinished.load() if self.given.unfinished is not None else None
        if saved is None:
            return
        numbers, tensors = saved
        self.step, self.stale = int(numbers["step"]), int(numbers["stale"])
        self.clip = float(numbers["clip"])
        self.total.fill_(numbers["total"])
        self.network.restore_(tensors)
        if self.average is not None:
            self.average.copy_(tensors["average"])
        if "best" in tensors:
            self.best = (numbers["best"], tensors["best"].to(self.network.device))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                key, _, index = rest.rpartition("/")
                moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        torch.default_generator.set_state(tensors["random"])
        if self.network.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random-device"], self.network.device)

    def _state(self) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        moments = {
            f"optimizer/{key}/{index}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        tensors = {**self.network.state(), **moments, "random": torch.default_generator.get_state()}
        if self.network.device.type == "cuda":
            tensors["random-device"] = torch.cuda.get_rng_state(self.network.device)
        if self.average is not None:
            tensors["average"] = self.average
        numbers = {"step": self.step, "stale": self.stale, "total": float(self.total), "clip": self.clip}
        if self.best is not None:
            numbers["best"], tensors["best"] = self.best
        return numbers, tensors

    def _set_learning_rate(self) -> None:
        progress = self.given.round - 1 + (self.step + 0.5) / self.steps
        factor = learning_rate_factor(self.config, progress, self.given.plateau)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
