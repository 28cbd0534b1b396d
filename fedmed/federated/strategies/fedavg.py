"""Federated averaging."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmed.federated.aggregation import Aggregate
from fedmed.federated.strategies.base import ServerStep, State
from fedmed.types import Weights


@dataclass(frozen=True)
class FedAvg(ServerStep):
    """w ← Σ kᵢ·wᵢ / Σ kᵢ  (McMahan et al. 2017, arXiv:1602.05629, algorithm 1).

    It is also the server's half of FedProx (Li et al. 2018, arXiv:1812.06127, algorithm 2), FedBN (Li et al. 2021,
    arXiv:2102.07623, algorithm 1) and Ditto (Li et al. 2021, arXiv:2012.04221, algorithm 1), which differ at the sites.
    """

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """The mean of the sites' networks is the next network."""
        parameters = np.add(current.parameters, aggregate.change, out=aggregate.change)
        return Weights(parameters=parameters, buffers=aggregate.buffers), state
