"""What an algorithm is given at a site in one round, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from fedmed.config import RunConfig
from fedmed.training.gradients import Correction
from fedmed.training.loop import Trained
from fedmed.training.network import FlatNetwork
from fedmed.types import FloatVector, Scalar, Weights


def _none() -> Mapping[str, FloatVector]:
    return MappingProxyType({})


class Train(Protocol):
    """Trains the visit's network in place, from the weights that it holds, on the site's training patients."""

    def __call__(self, *, correction: Correction | None = None, personal: bool = False) -> Trained:
        """One round of training.

        Args:
            correction: of the gradient, before every step of the optimizer.
            personal: with `strategy.personal-learning-rate`, as a network of the site's own is trained.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One round at one site, as its algorithm sees it."""

    config: RunConfig
    round: int  # 1-based
    plateau: float  # factor of the learning rate that the server has come to
    network: FlatNetwork  # holds the received weights, under FedBN with the site's own norm layers
    received: Weights
    vectors: Mapping[str, FloatVector]  # what else the server sent
    kept: Mapping[str, FloatVector]  # what the site kept of the rounds before; empty in its first one
    train_: Train
    held_out_loss: Callable[[], float]  # of the network as it is, on patients that the site holds out


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a round leaves behind: `kept` stays at the site, all else is sent."""

    trained: Trained
    weights: Weights
    facts: Mapping[str, Scalar] = field(default_factory=lambda: MappingProxyType({}))
    kept: Mapping[str, FloatVector] = field(default_factory=_none)


LocalAlgorithm = Callable[[Visit], Outcome]
