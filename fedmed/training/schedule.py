"""The learning rate over a run, as a factor of `train.learning-rate`."""

from __future__ import annotations

import math

from fedmed.config import TrainConfig


def learning_rate_factor(config: TrainConfig, progress: float, plateau: float = 1.0) -> float:
    """What the learning rate is multiplied by.

    Args:
        config: the schedule and its settings.
        progress: rounds done, with the share of the present one up to the middle of a step: in (0, rounds).
        plateau: what the server has come to by `plateau_factor`; 1 under other schedules.

    Returns:
        A factor in (0, 1]: min(1, progress / warm-up), times ½(1 + cos(π·progress/rounds)) under `cosine` (Loshchilov
        and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts).
    """
    factor = plateau if config.schedule == "plateau" else 1.0
    if config.warmup_rounds:
        factor *= min(1.0, progress / config.warmup_rounds)
    if config.schedule == "cosine":
        factor *= (1 + math.cos(math.pi * progress / config.rounds)) / 2
    return factor


def plateau_factor(config: TrainConfig, falls: int) -> float:
    """The factor of a `plateau` schedule after so many falls; 1 under other schedules."""
    return config.plateau_factor**falls if config.schedule == "plateau" else 1.0
