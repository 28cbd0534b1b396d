"""What a server does with what the sites agree on: one file per algorithm, one table."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.federated.strategies.base import ServerStep, State
from fedmed.federated.strategies.cyclic import Cyclic
from fedmed.federated.strategies.fedadagrad import fedadagrad
from fedmed.federated.strategies.fedadam import fedadam
from fedmed.federated.strategies.fedavg import FedAvg
from fedmed.federated.strategies.fedavgm import FedAvgM
from fedmed.federated.strategies.feddg_ga import FedDGGA
from fedmed.federated.strategies.fednova import FedNova
from fedmed.federated.strategies.fedyogi import fedyogi
from fedmed.federated.strategies.own import own_step
from fedmed.federated.strategies.scaffold import Scaffold

STRATEGIES: dict[str, Callable[[RunConfig], ServerStep]] = {
    "fedavg": FedAvg.from_config,
    "fedavgm": FedAvgM.from_config,
    "fedprox": FedAvg.from_config,  # the difference is at the sites, as with fedbn and ditto
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "scaffold": Scaffold.from_config,
    "fednova": FedNova.from_config,
    "fedbn": FedAvg.from_config,
    "ditto": FedAvg.from_config,
    "feddg-ga": FedDGGA.from_config,
    "cyclic": Cyclic.from_config,
}

__all__ = ["STRATEGIES", "ServerStep", "State", "server_step"]


def server_step(config: RunConfig) -> ServerStep:
    """The server's step that `[strategy]` asks for.

    Raises:
        ConfigError: there is no algorithm of that name (the nearest one is named), or the run asks for something that
            the algorithm does not define.
    """
    name, strategy = config.strategy.name, config.strategy
    if ":" not in name and name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.0)[0]
        raise ConfigError(f'strategy.name = "{name}": no such algorithm; did you mean "{near}"?')
    step = own_step(name, config) if ":" in name else STRATEGIES[name](config)
    reasons = {
        "a robust rule would choose among updates, and gives no sum of all of them": step.scaled_sum,
        "the algorithm itself says what each site counts for": step.weighs,
        "there is one site in a round, and nothing to combine": step.turns,
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    if step.scaled_sum and step.weighs:
        raise ConfigError(f'strategy.name = "{name}": an algorithm that says what sites count for has no scaled sum')
    if why and strategy.combine != "mean":
        raise ConfigError(f'strategy.name = "{name}" needs strategy.combine = "mean": {why}')
    if step.turns and (strategy.required_sites or strategy.min_fraction):
        needless = "strategy.required-sites" if strategy.required_sites else "strategy.min-fraction"
        raise ConfigError(
            f'strategy.name = "{name}" asks one site in a round, which none of the others joins; leave out {needless}, '
            "which in a comparison stands for every arm"
        )
    alone = why or type(step).admit is not ServerStep.admit
    if strategy.secure_sum and alone:
        raise ConfigError(f'strategy.name = "{name}" needs more of a site than its part in a sum (strategy.secure-sum)')
    return step
