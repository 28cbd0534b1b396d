"""SCAFFOLD: control variates take out of each site's steps what sets that site apart from the others."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fedmed.config import TrainConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.training.gradients import constant
from fedmed.training.local_algorithms.visit import Outcome, Visit
from fedmed.training.schedule import learning_rate_factor

CONTROL = "control"  # the server's c in a task, cᵢ on the site's disk
PIECES = 10_000  # of a round at whose middles its schedule is read


def scaffold(visit: Visit) -> Outcome:
    """Train with corrected gradients, and renew the site's control variate from the way that was gone.

    y ← y − η·(g(y) − cᵢ + c) from y = x, and after K steps, with option II (Karimireddy et al. 2020, arXiv:1910.06378,
    eq. 3 and 4, algorithm 1):

        cᵢ⁺ = cᵢ − c + (x − y) / (K·η),    Δcᵢ = cᵢ⁺ − cᵢ

    cᵢ stays on the site's disk, and the server computes Δcᵢ from what it sent and got (`strategies.scaffold`); both
    variates start at zero. An update that the server did not use leaves cᵢ as it was (`Task.counted`). K·η is
    `path_length`, which is the paper's for plain SGD at one learning rate, and keeps cᵢ⁺ a weighted mean of this
    round's gradients under momentum and schedules. Option I, a further pass over all images at x, is not offered:
    without noise it may not be combined with differential privacy, while option II only uses what the steps have
    released.

    Raises:
        ConfigError: the weights that are sent would not be a sum of gradients away from those received.
        ModelError: the server's variate has another length than the network.
    """
    _require_plain_steps(visit.config.train)
    received = visit.received.parameters
    zeros = np.zeros(received.size, np.float32)
    common, own = visit.vectors.get(CONTROL, zeros), visit.kept.get(CONTROL, zeros)
    if not common.size == own.size == received.size:
        raise ModelError(f"a control variate has another length than the network's {received.size} parameters")
    trained = visit.train_(correction=constant(visit.network, common - own))
    weights = visit.network.weights()
    length = path_length(visit.config.train, visit.round, visit.plateau, trained.steps)
    change = (received - weights.parameters) / np.float32(length) - common  # Δcᵢ
    return Outcome(trained=trained, weights=weights, kept={CONTROL: own + change})


def _require_plain_steps(config: TrainConfig) -> None:
    """The server refuses the same before the run; a site does not rely on that."""
    undefined = {
        f'train.optimizer = "{config.optimizer}"': config.optimizer != "sgd",
        "a moving average of weights (train.ema)": config.ema > 0,
        "the best of several epochs (train.patience)": config.patience > 0,
        "a learning rate for every layer (train.layer-decay)": config.layer_decay < 1,
    }
    for what in (what for what, asked in undefined.items() if asked):
        text = f"scaffold is not defined for {what}: a control variate is a mean of gradients"
        raise ConfigError.told(text)


def path_length(config: TrainConfig, round: int, plateau: float, steps: int) -> float:
    """By how much all of a round's gradients, were they one and the same, would have moved the weights.

    Σ_k η_k·m_k with m_k = β·m_{k−1} + 1, m_0 = 0: the sum of the weights that SGD with momentum β gives the gradients
    of steps 1 to k. It is K·η for β = 0 and a constant η, and follows from the task alone, so that a round that was
    killed and taken up again needs nothing more. In a round of more than `PIECES` steps η_k is that of the middle of
    its piece: a site says how many steps it took, and the server works no longer for one that claims more.

    Args:
        config: learning rate, momentum and schedule.
        round: 1-based.
        plateau: factor of the learning rate that the server has come to.
        steps: of the optimizer, all that the round was to take; at least 1.
    """
    pieces, total = min(steps, PIECES), 0.0
    for start, end in pairwise(steps * piece // pieces for piece in range(pieces + 1)):
        factor = learning_rate_factor(config, round - 1 + (start + end) / 2 / steps, plateau)
        total += config.learning_rate * factor * (_momenta(config.momentum, end) - _momenta(config.momentum, start))
    return total


def _momenta(beta: float, steps: int) -> float:
    """m_1 + … + m_K = (K - β·(1 - β^K) / (1 - β)) / (1 - β)."""
    return (steps - beta * (1 - beta**steps) / (1 - beta)) / (1 - beta)
