"""What every algorithm on the server is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedmed.federated.aggregation import Aggregate
from fedmed.types import FloatVector, Layout, Weights

State = Mapping[str, FloatVector]  # named vectors; saved with every checkpoint


class ServerStep(Protocol):
    """Turns the present global network and what the sites agree on into the next global network."""

    def start(self, layout: Layout) -> State:
        """The state before the first round."""
        ...

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """One round. `current` and `state` are never changed; the aggregate is handed over, to be used up."""
        ...
