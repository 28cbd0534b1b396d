"""Fine-tuning: after the last round every site trains the kept network on its own patients, for itself."""

from __future__ import annotations

from fedmed.config import RunConfig, StrategyConfig, TrainConfig


def personal_training(config: RunConfig) -> TrainConfig:
    """How a site trains a network of its own beside the shared one: as the shared one, at a rate of its own."""
    rate = config.strategy.personal_learning_rate or config.train.learning_rate
    return config.train.model_copy(update={"learning_rate": rate})


def fine_tuning(config: RunConfig) -> TrainConfig:
    """w_i ← `strategy.personal-steps` optimizer steps on F_i from the kept w  (Wang et al. 2019, arXiv:1910.10252).

    The learning rate is constant: the run's schedule has ended. There is no moving average and no early stopping, which
    would choose on the patients that the network is then judged on.
    """
    fresh = {"schedule": "constant", "warmup_rounds": 0.0, "ema": 0.0, "patience": 0, "rounds": 1}
    steps = {"local_steps": config.strategy.personal_steps, "local_epochs": 1}
    return personal_training(config).model_copy(update={**fresh, **steps})


def has_personal_network(strategy: StrategyConfig) -> bool:
    """Whether every site ends with a network of its own."""
    return strategy.name in ("ditto", "fedbn") or strategy.personal_steps > 0
