"""What a server does with the mean of the sites' networks: one file per algorithm, one table."""

from __future__ import annotations

import difflib

from fedmed.config import StrategyConfig
from fedmed.errors import ConfigError
from fedmed.federated.strategies.base import ServerStep
from fedmed.federated.strategies.fedavg import FedAvg
from fedmed.federated.strategies.fedavgm import FedAvgM

STRATEGIES: dict[str, type[FedAvg] | type[FedAvgM]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedprox": FedAvg,  # what sets these three apart happens at the sites
    "fedbn": FedAvg,
    "ditto": FedAvg,
}

__all__ = ["STRATEGIES", "ServerStep", "server_step"]


def server_step(config: StrategyConfig) -> ServerStep:
    """The server's step that `[strategy]` asks for.

    Raises:
        ConfigError: there is no algorithm of that name; the nearest one is named.
    """
    if config.name not in STRATEGIES:
        near = difflib.get_close_matches(config.name, STRATEGIES, n=1, cutoff=0.0)[0]
        raise ConfigError(f'strategy.name = "{config.name}": no such algorithm; did you mean "{near}"?')
    return STRATEGIES[config.name].from_config(config)
