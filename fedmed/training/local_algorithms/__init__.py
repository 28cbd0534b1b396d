"""What a site does in one round: one file per algorithm, one table.

An algorithm is a function from a `Visit` to an `Outcome`. One that is not in the table trains as FedAvg does, and does
its work on the server.
"""

from __future__ import annotations

from fedmed.config import StrategyConfig
from fedmed.training.local_algorithms.ditto import ditto
from fedmed.training.local_algorithms.fedavg import fedavg
from fedmed.training.local_algorithms.fedbn import fedbn
from fedmed.training.local_algorithms.feddg_ga import feddg_ga
from fedmed.training.local_algorithms.fedprox import fedprox
from fedmed.training.local_algorithms.scaffold import scaffold
from fedmed.training.local_algorithms.visit import LocalAlgorithm, Outcome, Visit

LOCAL_ALGORITHMS: dict[str, LocalAlgorithm] = {
    "fedprox": fedprox,
    "scaffold": scaffold,
    "fedbn": fedbn,
    "ditto": ditto,
    "feddg-ga": feddg_ga,
}
KEEPS_STATE = frozenset({"scaffold", "fedbn", "ditto"})  # of every round, on the site's own disk
FOLLOWS_SERVER = frozenset({"scaffold"})  # what the site keeps must be of the updates that the server has used

__all__ = ["FOLLOWS_SERVER", "KEEPS_STATE", "LOCAL_ALGORITHMS", "Outcome", "Visit", "local_algorithm", "needs_folder"]


def local_algorithm(strategy: StrategyConfig) -> LocalAlgorithm:
    """What a site does under `strategy.name`."""
    return LOCAL_ALGORITHMS.get(strategy.name, fedavg)


def needs_folder(strategy: StrategyConfig) -> bool:
    """Whether a site has to keep something between tasks, or a network of its own at the end."""
    return strategy.name in KEEPS_STATE or strategy.personal_steps > 0
