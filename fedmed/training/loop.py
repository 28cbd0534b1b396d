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
from fedmed.training.network import FlatNetwork, mixes_images
from fedmed.training.precision import in_float32, settled
from fedmed.training.sampling import NOBODY_TO_TRAIN_ON, Rows, batches
from fedmed.training.schedule import learning_rate_factor
from fedmed.training.tiles import within
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
class RoundContext:
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
    context: RoundContext | None = None,
) -> Trained:
    """Train `network` in place on the given rows of `data`.

    Raises:
        DataError: there is no row to train on.
    """
    if len(rows) == 0:
        raise DataError.told(NOBODY_TO_TRAIN_ON)
    context = context or RoundContext()
    seed = int(generator.integers(2**63))
    network.module.train()
    alone = not mixes_images(network.module)
    order = list(batches(rows, config, generator, context.weights, alone=alone))
    with seeded(seed, network.device):  # dropout inside the network, if it has any
        training = Training(network, config, context, -(-len(order) // config.accumulate))
        training.take_up()
        supervised = deeply_supervised(loss)
        first = training.step * config.accumulate
        numbered = enumerate(order[first:], start=first)
        margin = network.margin_voxels
        parts = (training_batch(data, chosen, config, (seed, number), margin) for number, chosen in numbered)
        while not training.stopped and (group := list(islice(parts, config.accumulate))):
            training.step_(partial(_mean_gradient_, network, config, supervised, group))
            training.end_step(at_end_of_pass=_ends_a_pass(training.step, len(order) // config.local_epochs, config))
    return training.result_()


def training_batch(data: Dataset, chosen: Rows, config: TrainConfig, seed: tuple[int, ...], margin: int = 0) -> Batch:
    """Images and targets of a step, changed at random if the run asks for it; the change depends on the seed alone.

    Images bring a margin of so many voxels for a network that wants one; it moves with them, and targets have none.
    Where patches with foreground are to come up more often, none loses all of it by being cut elsewhere.
    """
    if not config.augment:
        images, targets = data.batch(chosen, margin=margin)
        return images, within(targets, margin)
    generator = np.random.default_rng(seed)
    balanced = config.sampling == "balanced"
    images, targets = data.batch(chosen, generator=generator, margin=margin, keep_foreground=balanced)
    drawn = augment.sample(config.augment, images.shape[1:], len(images), generator)
    if targets.ndim == images.ndim:
        images, targets = augment.apply(images, targets, drawn)
        return images, within(targets, margin)
    return augment.apply(images, None, drawn)[0], targets


def _mean_gradient_(network: FlatNetwork, config: TrainConfig, loss: AnyLoss, group: Sequence[Batch]) -> Tensor:
    """Leave the gradient of the loss over some batches as if they were one, and give that loss.

    Each weighs as many known labels as it has: where none is unknown, as many images.
    """
    device = network.device
    half = torch.autocast(device.type, torch.bfloat16, enabled=settled(config.precision, device) == "bfloat16")
    known = [int((~torch.isnan(targets)).sum()) for _, targets in group] if len(group) > 1 else [1]
    total = torch.zeros((), device=device)
    for parameter in network.parameters:
        parameter.grad = None
    for (images, targets), labels in zip(group, known, strict=True):
        with half:
            outputs = network(images.to(device), channels_last=config.channels_last)
        value = loss(in_float32(outputs), targets.to(device)) * (labels / max(sum(known), 1))
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        total += value.detach()
    return total


def _ends_a_pass(step: int, batches_in_a_pass: int, config: TrainConfig) -> bool:
    """Whether a step took in the last batch of a pass; with `accumulate` it may go on into the next one."""
    taken, before = step * config.accumulate, (step - 1) * config.accumulate
    return config.local_steps == 0 and taken // batches_in_a_pass > before // batches_in_a_pass


class Training:
    """The state of one round's training: the network, its optimizer, and what has been seen so far."""

    def __init__(
        self, network: FlatNetwork, config: TrainConfig, context: RoundContext, steps: int, *, secret: bool = False
    ) -> None:
        """Begin with a fresh optimizer.

        Args:
            network: to be trained.
            config: of the run.
            context: what besides data and settings decides the round.
            steps: what the schedule is laid over.
            secret: what the network draws from, for dropout, is neither saved nor restored.
        """
        self.network, self.config, self.context, self.steps, self.secret = network, config, context, steps, secret
        self.optimizer = optimizer_for(config, network)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.total, self.step = torch.zeros((), device=network.device), 0
        self.average = _copied(network.state()) if config.ema else None
        self.best: tuple[float, dict[str, Tensor]] | None = None  # validation loss of the best pass, and its weights
        self.stale = 0
        self.clip = 0.0  # the bound that adaptive clipping has come to; 0 = that of the round's beginning

    def step_(self, gradient_: Callable[[], Tensor]) -> None:
        """One optimizer step on the gradient that a function leaves in the parameters; it gives the loss, a scalar."""
        self._set_learning_rate()
        self.total += gradient_()
        if self.context.correction is not None:
            self.context.correction()
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            kept = _ema_decay(self.config.ema, self.step)
            for name, tensor in self.network.state().items():
                if tensor.is_floating_point():
                    self.average[name].lerp_(tensor, 1 - kept)
                else:
                    self.average[name].copy_(tensor)

    @property
    def stopped(self) -> bool:
        """Whether the round is to end early: so many passes have brought nothing better."""
        return 0 < self.config.patience <= self.stale

    def end_step(self, *, at_end_of_pass: bool) -> None:
        """Judge the network at the end of a pass, and save if it is time to."""
        if at_end_of_pass and self.config.patience and self.context.validation is not None:
            value = self.context.validation()
            self.network.module.train()
            if self.best is None or value < self.best[0]:
                self.best, self.stale = (value, _copied(self.network.state())), 0
            else:
                self.stale += 1
        if self.context.unfinished is not None and self.context.unfinished.due and self.step < self.steps:
            self.context.unfinished.save(*self._state())

    def result_(self) -> Trained:
        """Leave the network with the weights that the site is to send."""
        self.optimizer.zero_grad(set_to_none=True)  # their memory serves the copy of the weights that leaves now
        if self.best is not None:
            self.network.restore_(self.best[1])
        elif self.average is not None:
            self.network.restore_(self.average)
        return Trained(loss=float(self.total) / self.step, steps=self.step)

    def take_up(self) -> None:
        """Go on where a process of this round was killed, if there was one."""
        saved = self.context.unfinished.load() if self.context.unfinished is not None else None
        if saved is None:
            return
        numbers, tensors = saved
        self.step, self.stale = int(numbers["step"]), int(numbers["stale"])
        self.clip = float(numbers["clip"])
        self.total.fill_(numbers["total"])
        self.network.restore_(tensors)
        if self.average is not None:
            self.average = _under("average/", tensors, self.network.device)
        if "best" in numbers:
            self.best = (numbers["best"], _under("best/", tensors, self.network.device))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                key, _, index = rest.rpartition("/")
                moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.secret:
            return
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
        tensors = {**self.network.state(), **moments}
        if not self.secret:
            tensors["random"] = torch.default_generator.get_state()
            if self.network.device.type == "cuda":
                tensors["random-device"] = torch.cuda.get_rng_state(self.network.device)
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        numbers = {"step": self.step, "stale": self.stale, "total": float(self.total), "clip": self.clip}
        if self.best is not None:
            numbers["best"] = self.best[0]
            tensors |= {f"best/{name}": tensor for name, tensor in self.best[1].items()}
        return numbers, tensors

    def _set_learning_rate(self) -> None:
        progress = self.context.round - 1 + (self.step + 0.5) / self.steps
        factor = learning_rate_factor(self.config, progress, self.context.plateau)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor


def _ema_decay(most: float, step: int) -> float:
    """min(most, (1 + k) / (10 + k)) after step k of a round, from 1.

    As TensorFlow's ExponentialMovingAverage does with `num_updates`. An average begins anew in every round. With one
    decay from its first step on, a round of few steps would send little but what it received: 0.999¹⁰ is 99 %.
    """
    return min(most, (1 + step) / (10 + step))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _under(beginning: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(beginning)}
    return {name.removeprefix(beginning): tensor.to(device) for name, tensor in found.items()}
