"""SCAFFOLD: control variates that hold sites back from drifting apart. This is the server's half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedmed.config import RunConfig
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.strategies.base import ServerStep, State, needs_plain_steps
from fedmed.types import FloatVector, Layout, Weights


@dataclass(frozen=True, kw_only=True)
class Scaffold(ServerStep):
    """w ← w + η·Δ,  c ← c + |S|/N · Δc  (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, lines 16-17).

    Δ and Δc are means over the |S| sites of the round, N is the number of all sites. The paper's means count every
    site alike; with `strategy.weight-by = "uniform"` so do these. Otherwise both are weighted, and by the same weights:
    a site corrects its gradient by c - cᵢ, and only if c weighs the cᵢ as Δ weighs the sites do these corrections
    cancel, so that the optimum of the weighted objective is a fixed point.
    """

    vectors: ClassVar[tuple[str, ...]] = ("control",)
    learning_rate: float = 1.0  # η, the paper's global step

    @classmethod
    def from_config(cls, config: RunConfig) -> Scaffold:
        """Read `strategy.server-learning-rate`, which is 1 unless set.

        Raises:
            ConfigError: sites do not take plain SGD steps, or updates are clipped and the variates would not be.
        """
        needs_plain_steps(config, momentum=False)
        return cls(learning_rate=config.strategy.server_learning_rate or 1.0)

    def start(self, layout: Layout) -> State:
        """The server's variate starts at zero, as the sites' do."""
        return {"control": np.zeros(layout.num_parameters, np.float32)}

    def outgoing(self, state: State) -> State:
        """Every site needs c."""
        return {"control": state["control"]}

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """A step along the mean change, and the variate moved by the mean change of the sites' variates."""
        change = np.multiply(aggregate.change, np.float32(self.learning_rate), out=aggregate.change)
        parameters: FloatVector = np.add(current.parameters, change, out=change)
        present = len(aggregate.contributions)
        share = np.float32(present / max(present, aggregate.known))
        control = state["control"] + share * aggregate.vectors["control"]
        return Weights(parameters=parameters, buffers=aggregate.buffers), {"control": control}
