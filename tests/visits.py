"""Rounds at toy sites without a server, and the plain PyTorch loops that they are compared with."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from toy import dataset

from fedmed.config import RunConfig
from fedmed.models import build
from fedmed.training.losses import masked_bce
from fedmed.training.network import FlatNetwork
from fedmed.training.own_patients import site_generator
from fedmed.training.site import Site, settings_for_sites
from fedmed.training.site_round import evaluate_round, train_round
from fedmed.types import FloatVector, Task, Update, Weights


@dataclass(frozen=True)
class Visits:
    """One run at toy sites; states lie under `folder`."""

    config: RunConfig
    folder: Path | None

    def site(self, name: str, **keys) -> Site:
        state_dir = self.folder / name if self.folder else None
        return Site(name=name, manifest=Path(name), dataset="toy:dataset", state_dir=state_dir, **keys)

    def task(self, round: int, weights: Weights, vectors: Mapping[str, FloatVector] | None = None, **keys) -> Task:
        settings, layout = settings_for_sites(self.config), flat(self.config).layout.hash
        counted = dict.fromkeys(map(str, self.config.data.sites), round - 1)  # every update so far was used
        values = {"kind": "train", "evaluate": False, "counted": counted, **keys}
        return Task(round=round, settings=settings, layout=layout, weights=weights, vectors=vectors or {}, **values)

    def train(self, name: str, round: int, weights: Weights, vectors=None, **keys) -> Update:
        return train_round(self.task(round, weights, vectors, **keys), self.site(name))

    def evaluate(self, name: str, round: int, weights: Weights, **keys) -> Update:
        return evaluate_round(self.task(round, weights, kind="evaluate", **keys), self.site(name))

    def kept(self, name: str, round: int) -> Path:
        (found,) = (self.folder / name).glob(f"*/round-{round:04d}.safetensors")
        return found


def flat(config: RunConfig) -> FlatNetwork:
    return FlatNetwork(build(config.model, outputs=2, seed=config.seed), torch.device("cpu"))


def mean_of(updates: list[Update]) -> Weights:
    """The plain mean, every site alike."""
    parts = ([update.weights.parameters for update in updates], [update.weights.buffers for update in updates])
    parameters, buffers = (np.mean(part, axis=0, dtype=np.float64).astype(np.float32) for part in parts)
    return Weights(parameters=parameters, buffers=buffers)


def batches_of(config: RunConfig, name: str, round: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one pass over a site's training patients, in the order that its round has."""
    data, generator = dataset(Path(name), config), site_generator(config.seed, name, round)
    generator.integers(2**63)
    order, size = generator.permutation(np.flatnonzero(~data.evaluation)), config.train.batch_size
    for start in range(0, len(order), size):
        yield data.batch(order[start : start + size])


def plain_steps(
    config: RunConfig,
    name: str,
    round: int,
    start: Weights,
    *,
    penalty: Callable[[torch.nn.Module], torch.Tensor] | None = None,
    added: FloatVector | None = None,
    rate: float | None = None,
) -> Weights:
    """SGD as anybody would write it: a penalty in the loss by autograd, or a vector added to the gradient."""
    network = flat(config)
    network.load_(start)
    module = network.module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=rate or config.train.learning_rate)
    for images, targets in batches_of(config, name, round):
        optimizer.zero_grad()
        loss = masked_bce(module(images), targets)
        (loss if penalty is None else loss + penalty(module)).backward()
        if added is not None:
            begin = 0
            for parameter in module.parameters():
                part = added[begin : begin + parameter.numel()]
                parameter.grad += torch.from_numpy(part.copy()).view_as(parameter)
                begin += parameter.numel()
        optimizer.step()
    return network.weights()


def squared_distance(config: RunConfig, anchor: Weights, strength: float) -> Callable[[torch.nn.Module], torch.Tensor]:
    """μ/2 · ‖w − anchor‖², for autograd."""
    still = flat(config)
    still.load_(anchor)
    fixed = [parameter.detach().clone() for parameter in still.module.parameters()]

    def penalty(module: torch.nn.Module) -> torch.Tensor:
        pairs = zip(module.parameters(), fixed, strict=True)
        return strength / 2 * sum(((parameter - other) ** 2).sum() for parameter, other in pairs)

    return penalty
