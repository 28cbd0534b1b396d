"""Federated averaging."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmed.config import StrategyConfig
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.strategies.base import State
from fedmed.types import Layout, Weights


@dataclass(frozen=True)
class FedAvg:
    """w ← Σ kᵢ·wᵢ / Σ kᵢ  (McMahan et al. 2017, arXiv:1602.05629, algorithm 1)."""

    @classmethod
    def from_config(cls, config: StrategyConfig) -> FedAvg:
        """FedAvg has no setting of its own."""
        return cls()

    def start(self, layout: Layout) -> State:
        """FedAvg keeps nothing between rounds."""
        return {}

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """The mean of the sites' networks is the next network."""
        parameters = np.add(current.parameters, aggregate.change, out=aggregate.change)
        return Weights(parameters=parameters, buffers=aggregate.buffers), state
