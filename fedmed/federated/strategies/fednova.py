"""FedNova: sites that take different numbers of steps are normalised before they are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.strategies.base import ServerStep, State, needs_plain_steps, require_steps
from fedmed.types import Scalar, Update, Weights


@dataclass(frozen=True, kw_only=True)
class FedNova(ServerStep):
    """w ← w + τ_eff · Σ pᵢ·Δᵢ/‖aᵢ‖₁ with τ_eff = Σ pᵢ·‖aᵢ‖₁  (Wang et al. 2020, arXiv:2007.07481, eq. 6 and 7).

    pᵢ are the normalised weights, and aᵢ says how often each of a site's τᵢ gradients counts in its change Δᵢ. Without
    it, a site that takes more steps weighs more, and the federation minimises another objective than it says.
    """

    config: RunConfig

    @property
    def momentum(self) -> float:
        """ρ of the sites' SGD."""
        return self.config.train.momentum

    @classmethod
    def from_config(cls, config: RunConfig) -> FedNova:
        """Keep the run's settings, from which it follows how many steps a site can have taken.

        Raises:
            ConfigError: sites do not take SGD steps, or a robust rule would take their word for the number of steps.
        """
        needs_plain_steps(config, momentum=True)
        if config.strategy.combine != "mean":
            text = "a site that lies about its steps would change the scale of all"
            raise ConfigError(f'strategy.name = "fednova" needs strategy.combine = "mean": {text}')
        return cls(config=config)

    def admit(self, update: Update) -> float:
        """1/‖aᵢ‖₁.

        Raises:
            UpdateRefused: the site does not say how many steps it took, or another number than it can have taken.
        """
        require_steps(self.config, update)
        return 1 / self.norm(update.facts)

    def norm(self, facts: Mapping[str, Scalar]) -> float:
        """‖a‖₁ = τ, or [τ - ρ·(1 - ρ^τ)/(1 - ρ)] / (1 - ρ) with momentum ρ  (Wang et al. 2020, section 4)."""
        steps, rho = int(facts["steps"]), self.momentum
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)

    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """A step along the mean of the normalised changes, as long as the sites' mean number of steps."""
        total = sum(each.weight for each in aggregate.contributions)
        effective = sum(each.weight * self.norm(each.facts) for each in aggregate.contributions) / total
        change = np.multiply(aggregate.change, np.float32(effective), out=aggregate.change)
        parameters = np.add(current.parameters, change, out=change)
        return Weights(parameters=parameters, buffers=aggregate.buffers), state
