"""Federated averaging with momentum on the server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmed.config import RunConfig
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.strategies.base import ServerStep, State
from fedmed.types import Layout, Weights


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerStep):
    """v ← β·v - Δ,  w ← w - η·v  (Hsu et al. 2019, arXiv:1909.06335, section 4).

    Δ is the weighted mean of the sites' changes. Buffers (running statistics) are averaged and carry no momentum.
    With one full-batch SGD step per round this is SGD with momentum β on the pooled data.
    """

    momentum: float = 0.9  # β
    learning_rate: float = 1.0  # η

    @classmethod
    def from_config(cls, config: RunConfig) -> FedAvgM:
        """Read `strategy.server-momentum` and `strategy.server-learning-rate`, which is 1 unless set."""
        strategy = config.strategy
        return cls(momentum=strategy.server_momentum, learning_rate=strategy.server_learning_rate or 1.0)

    def start(self, layout: Layout) -> State:
        """The velocity starts at zero."""
        return {"velocity": np.zeros(layout.num_parameters, np.float32)}

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """One step along the velocity."""
        velocity = np.float32(self.momentum) * state["velocity"] - aggregate.change
        parameters = current.parameters - np.float32(self.learning_rate) * velocity
        return Weights(parameters=parameters, buffers=aggregate.buffers), {"velocity": velocity}
