"""FedDG-GA: sites on which the global network falls furthest behind their own count for more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedmed.config import RunConfig
from fedmed.errors import UpdateRefused
from fedmed.federated.aggregation import Aggregate, Contribution
from fedmed.federated.strategies.base import ServerStep, State
from fedmed.types import Layout, Update, Weights

LARGEST = 1e30  # loss; the state holds float32
RECEIVED, TRAINED = "held-out-loss-received", "held-out-loss-trained"


@dataclass(frozen=True, kw_only=True)
class FedDGGA(ServerStep):
    """aᵢ ← aᵢ + dʳ·(Gᵢ - μ) / maxⱼ|Gⱼ - μ|, clipped to [0, 1] and scaled back to their sum; w ← Σ aᵢ·wᵢ / Σ aᵢ.

    Zhang et al. 2023 (CVPR, "Federated Domain Generalization with Generalization Adjustment", algorithm 1). The
    generalisation gap Gᵢ is the loss, on patients that site i holds out, of the global network that it received minus
    that of the network that it had sent in the round before; μ is the mean gap (the authors' own program leaves it
    out), and dʳ = d·(1 - (r - 1)/R) falls over the R rounds. All sites begin alike. A site whose gap is not known yet,
    in its first round, keeps its weight; a site that misses a round keeps it too. If the sites of a round all weigh
    nothing, they count alike.
    """

    weighs: ClassVar[bool] = True
    step_size: float = 0.2  # d
    rounds: int = 1  # R

    @classmethod
    def from_config(cls, config: RunConfig) -> FedDGGA:
        """Read `strategy.adjustment` and `train.rounds`."""
        return cls(step_size=config.strategy.adjustment, rounds=config.train.rounds)

    def start(self, layout: Layout) -> State:
        """Rounds so far. Each site's entry, (weight, loss of the network that it sent), comes when it is first seen."""
        return {"round": np.zeros(1, np.float32)}

    def admit(self, update: Update) -> float:
        """Nothing is scaled; the two losses must be there."""
        for name in (RECEIVED, TRAINED):
            loss = update.facts.get(name)
            if not isinstance(loss, int | float) or not abs(loss) < LARGEST:
                raise UpdateRefused(f"feddg-ga needs the site's loss, below {LARGEST:g}, on patients that it holds out")
        return 1.0

    def shares(self, contributions: Sequence[Contribution], state: State) -> Mapping[str, float]:
        """The adjusted weights of the sites of this round; their sum is what it was, and 1 if all are there."""
        sites = [each.site for each in contributions]
        seen = {site: float(state[f"site/{site}"][0]) for site in sites if f"site/{site}" in state}
        alike = sum(seen.values()) / len(seen) if seen else 1 / len(sites)
        gaps = {
            number: float(each.facts[RECEIVED]) - float(state[f"site/{each.site}"][1])
            for number, each in enumerate(contributions)
            if each.site in seen
        }
        adjustment = np.zeros(len(sites))
        if gaps:
            centred = np.array(list(gaps.values())) - np.mean(list(gaps.values()))
            largest = np.abs(centred).max()
            step = self.step_size * max(0.0, 1 - float(state["round"][0]) / self.rounds)
            if largest > 0:
                adjustment[list(gaps)] = step * centred / largest
        before = np.array([seen.get(site, alike) for site in sites])
        clipped = np.clip(before + adjustment, 0, 1)
        weights = clipped * before.sum() / clipped.sum() if clipped.any() else before
        if not weights.any():  # those who would weigh something did not answer
            weights = np.full(len(sites), 1 / len(sites))
        return dict(zip(sites, weights.tolist(), strict=True))

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """The mean with the adjusted weights; what the next adjustment needs is kept."""
        shares = self.shares(aggregate.contributions, state)
        entries = {
            f"site/{each.site}": np.array([shares[each.site], each.facts[TRAINED]], np.float32)
            for each in aggregate.contributions
        }
        parameters = np.add(current.parameters, aggregate.change, out=aggregate.change)
        after = {**state, **entries, "round": state["round"] + np.float32(1)}
        return Weights(parameters=parameters, buffers=aggregate.buffers), after
