"""What FedAdagrad, FedAdam and FedYogi share: all but how the second moment moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedmed.config import RunConfig
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.strategies.base import ServerStep, State
from fedmed.types import FloatVector, Layout, Weights

SecondMoment = Callable[[FloatVector, FloatVector, np.float32], FloatVector]  # (v, Δ², β₂) -> next v


@dataclass(frozen=True, kw_only=True)
class Adaptive(ServerStep):
    """m ← β₁·m + (1 - β₁)·Δ,  v ← second_moment(v, Δ², β₂),  w ← w + η·m / (√v + τ).

    Reddi et al. 2021, arXiv:2003.00295, algorithm 2; Δ is the combined change of the sites, v starts at τ², and nothing
    is bias-corrected. Buffers (running statistics) are pooled and carry no moment. The moments are kept in float32, as
    the weights are: each round moves v by a share of 1 - β₂, thousands of times what float32 can tell apart.
    """

    second_moment: SecondMoment
    learning_rate: float = 0.01  # η
    momentum: float = 0.9  # β₁
    second_momentum: float = 0.99  # β₂
    adaptivity: float = 1e-3  # τ

    @classmethod
    def with_moment(cls, config: RunConfig, second_moment: SecondMoment) -> Adaptive:
        """Read the `strategy.server-…` keys; the learning rate is 0.01 unless set."""
        strategy = config.strategy
        return cls(
            second_moment=second_moment,
            learning_rate=strategy.server_learning_rate or 0.01,
            momentum=strategy.server_momentum,
            second_momentum=strategy.server_second_momentum,
            adaptivity=strategy.server_adaptivity,
        )

    def start(self, layout: Layout) -> State:
        """No momentum yet, and the smallest second moment that the paper allows."""
        size = layout.num_parameters
        return {
            "momentum": np.zeros(size, np.float32),
            "second-moment": np.full(size, self.adaptivity**2, np.float32),
        }

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """One step of the server's optimizer along the sites' change."""
        beta, change = np.float32(self.momentum), aggregate.change
        second = self.second_moment(state["second-moment"], change * change, np.float32(self.second_momentum))
        momentum = beta * state["momentum"] + (1 - beta) * change
        divisor = np.sqrt(second) + np.float32(self.adaptivity)
        parameters = current.parameters + np.float32(self.learning_rate) * momentum / divisor
        return Weights(parameters=parameters, buffers=aggregate.buffers), {
            "momentum": momentum,
            "second-moment": second,
        }
