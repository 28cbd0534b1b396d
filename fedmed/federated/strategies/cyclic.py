"""Cyclic weight transfer: the network travels from site to site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedmed.errors import RunFailed
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.strategies.base import ServerStep, State
from fedmed.types import Weights


@dataclass(frozen=True)
class Cyclic(ServerStep):
    """w ← wᵢ, i = 1, 2, …, n, 1, 2, …: one site a round  (Chang et al. 2018, doi:10.1093/jamia/ocy017).

    It is not shown to converge, and what the last sites taught weighs most. It serves sites that cannot be there at the
    same time.
    """

    turns: ClassVar[bool] = True

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """The network of the one site of this round.

        Raises:
            RunFailed: several sites took part at once.
        """
        if len(aggregate.contributions) > 1:
            raise RunFailed(f"cyclic takes one site in a round; {len(aggregate.contributions)} took part")
        parameters = np.add(current.parameters, aggregate.change, out=aggregate.change)
        return Weights(parameters=parameters, buffers=aggregate.buffers), state
