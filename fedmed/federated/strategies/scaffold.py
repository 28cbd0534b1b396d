"""SCAFFOLD: control variates that hold sites back from drifting apart. This is the server's half."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedmed.config import RunConfig
from fedmed.errors import ConfigError, RunFailed
from fedmed.federated.aggregation import Aggregate, Contribution
from fedmed.federated.strategies.base import ServerStep, State, needs_plain_steps, require_steps
from fedmed.training.local_algorithms.scaffold import path_length
from fedmed.types import FloatVector, Layout, Update, Weights


@dataclass(frozen=True, kw_only=True)
class Scaffold(ServerStep):
    """w ← w + η·Δ,  c ← Σ kᵢ·cᵢ / Σ kᵢ  (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, lines 16-17).

    Δ is the mean over the sites of the round, c that of the variates of all sites known. A site whose update is used
    has moved its own by Δcᵢ = (x - yᵢ) / (K·η) - c, option II, which the server computes itself: x it sent, yᵢ it got,
    and K·η, `path_length`, follows from the run and the number of steps. So nothing but the network travels back, and
    `strategy.max-update-norm` bounds c as well.

    The paper's means count every site alike; with `strategy.weight-by = "uniform"` so do these. Otherwise both are
    weighted, and by the same weights: a site corrects its gradient by c - cᵢ, and only if c weighs the cᵢ as Δ weighs
    the sites do these corrections cancel, so that the optimum of the weighted objective is a fixed point. In c a site
    keeps the weight that it had in its first round. Those that had none yet, with cᵢ = 0, are taken to weigh as much as
    the others do on average.
    """

    scaled_sum: ClassVar[bool] = True
    config: RunConfig
    learning_rate: float = 1.0  # η, the paper's global step

    @classmethod
    def from_config(cls, config: RunConfig) -> Scaffold:
        """Read `strategy.server-learning-rate`, which is 1 unless set.

        Raises:
            ConfigError: sites do not take plain SGD steps, or updates are clipped and the variates would not be.
        """
        needs_plain_steps(config, momentum=False)
        if config.strategy.clip_norm:
            text = "the variates that sites keep would not be clipped"
            raise ConfigError(f'strategy.name = "scaffold" needs strategy.clip-norm = 0: {text}')
        return cls(config=config, learning_rate=config.strategy.server_learning_rate or 1.0)

    def start(self, layout: Layout) -> State:
        """The server's variate starts at zero, as the sites' do. A site's weight comes with its first update."""
        return {"control": np.zeros(layout.num_parameters, np.float32), "sites": np.zeros(1, np.float32)}

    def outgoing(self, state: State) -> State:
        """Every site needs c."""
        return {"control": state["control"]}

    def admit(self, update: Update) -> float:
        """Nothing is scaled.

        Raises:
            UpdateRefused: the site does not say how many steps it took, or another number than it can have taken.
        """
        require_steps(self.config, update)
        return 1.0

    def scaled_sum_factor(self, contribution: Contribution, state: State, *, round: int, plateau: float) -> float:
        """kᵢ / (K·η)."""
        weight = _weights(state).get(contribution.site, contribution.weight)
        return weight / path_length(self.config.train, round, plateau, int(contribution.facts["steps"]))

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """A step along the mean change, and the variate as the mean of the sites' variates.

        With T = Σ kᵢ over all sites known, and S the sites of the round,
        T·c ← T·c + Σ_S kᵢ·Δcᵢ = (T - Σ_S kᵢ)·c - Σ_S kᵢ·(yᵢ - x) / (K·η).

        Raises:
            RunFailed: the changes were not added up for it.
        """
        if aggregate.scaled_sum is None:
            raise RunFailed("scaffold needs the sum of the changes by their steps")
        before = _weights(state)
        after = {each.site: each.weight for each in aggregate.contributions} | before
        sites = max(aggregate.known, int(state["sites"][0]), len(after))
        total = _total(after, sites)
        rest = _total(before, int(state["sites"][0])) - sum(after[each.site] for each in aggregate.contributions)
        control = np.float32(rest / total) * state["control"] - aggregate.scaled_sum * np.float32(1 / total)
        change = np.multiply(aggregate.change, np.float32(self.learning_rate), out=aggregate.change)
        parameters: FloatVector = np.add(current.parameters, change, out=change)
        kept = {f"weight/{site}": np.array([weight], np.float32) for site, weight in after.items()}
        return Weights(parameters=parameters, buffers=aggregate.buffers), {
            "control": control,
            "sites": np.array([sites], np.float32),
            **kept,
        }


def _weights(state: State) -> dict[str, float]:
    """By site, what it weighs in c."""
    return {key.removeprefix("weight/"): float(k[0]) for key, k in state.items() if key.startswith("weight/")}


def _total(weights: Mapping[str, float], sites: int) -> float:
    """The sum over so many sites, of which some weights are not known yet."""
    return sum(weights.values()) * max(sites / len(weights), 1.0) if weights else 0.0
