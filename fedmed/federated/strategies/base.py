"""What every algorithm on the server is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from fedmed.config import RunConfig
from fedmed.errors import ConfigError, UpdateRefused
from fedmed.federated.aggregation import Aggregate, Contribution
from fedmed.training.sampling import steps_allowed
from fedmed.types import FloatVector, Layout, Update, Weights

State = Mapping[str, FloatVector]  # named vectors; saved with every checkpoint


class ServerStep(ABC):
    """Turns the present global network and what the sites agree on into the next global network.

    An algorithm is a subclass of this one that defines `__call__`, and of the rest what it needs. It holds settings and
    no state: what changes from round to round is the `State`, which is saved with every checkpoint, so that a resumed
    run goes on with the same bits.
    """

    scaled_sum: ClassVar[bool] = False  # whether the changes are added up once more, with `scaled_sum_factor`
    turns: ClassVar[bool] = False  # one site at a time, each in its turn
    weighs: ClassVar[bool] = False  # whether `shares` says what each site counts for, and not strategy.weight-by

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """The algorithm with the run's settings.

        Raises:
            ConfigError: the run asks for something that the algorithm does not define.
        """
        return cls()

    def start(self, layout: Layout) -> State:
        """The state before the first round."""
        return {}

    def outgoing(self, state: State) -> Mapping[str, FloatVector]:
        """The vectors that travel to the sites with the network, as `Task.vectors`."""
        return {}

    def admit(self, update: Update) -> float:
        """The factor by which this update's change is multiplied before anything else, usually 1.

        Raises:
            UpdateRefused: the update lacks something that the algorithm needs.
        """
        return 1.0

    def shares(self, contributions: Sequence[Contribution], state: State) -> Mapping[str, float]:
        """What each site counts for, by name, where `weighs` is true; only ratios matter."""
        return {each.site: each.weight for each in contributions}

    def scaled_sum_factor(self, contribution: Contribution, state: State, *, round: int, plateau: float) -> float:
        """What a site's change is multiplied by in `aggregate.scaled_sum`, where `scaled_sum` is true.

        Args:
            contribution: of the site, with the weight that counts in the end.
            state: before the round.
            round: 1-based.
            plateau: factor of the learning rate that the sites were sent.
        """
        return contribution.weight

    @abstractmethod
    def __call__(self, current: Weights, aggregate: Aggregate, state: State) -> tuple[Weights, State]:
        """One round. `current` and `state` are never changed; the aggregate is handed over, to be used up."""


def needs_plain_steps(config: RunConfig, *, momentum: bool) -> None:
    """Refuse local training whose result is not a sum of gradients times learning rates.

    Args:
        config: the run.
        momentum: whether the algorithm knows what momentum at the sites does to that sum.

    Raises:
        ConfigError: for Adam-like optimizers, momentum, a moving average of weights or a network of an earlier epoch.
    """
    name, train = config.strategy.name, config.train
    undefined = {
        f'train.optimizer = "{train.optimizer}"; use "sgd"': train.optimizer != "sgd",
        f"train.momentum = {train.momentum}; use 0": train.momentum and not momentum,
        f"train.ema = {train.ema}; use 0": train.ema,
        f"train.patience = {train.patience}; use 0": train.patience,
    }
    for what, set_so in undefined.items():
        if set_so:
            raise ConfigError(f'strategy.name = "{name}" is not defined for {what}')


def require_steps(config: RunConfig, update: Update) -> None:
    """Refuse an update that does not say how many steps its site took, or another number than the run lets it take.

    Args:
        config: the run.
        update: what a site sent; its counts are checked already.

    Raises:
        UpdateRefused: with the reason, which names no site.
    """
    name, steps = config.strategy.name, update.facts.get("steps")
    allowed = steps_allowed(config, max(update.num_examples, 1))
    if not isinstance(steps, int) or steps not in allowed:
        claimed = f"{steps} steps" if isinstance(steps, int) and abs(steps) < 1e300 else "no number of steps"
        span = f"{allowed.start}" if len(allowed) == 1 else f"{allowed.start} to {allowed.stop - 1}"
        raise UpdateRefused(
            f"the update claims {claimed}, which {name} needs; with the run's settings and {update.num_examples} "
            f"examples there are {span}"
        )
