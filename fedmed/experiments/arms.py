"""The arms of a comparison as run configurations, all with the same budget.

With `train.local-epochs` the budget is images: every arm trains `rounds x local-epochs` passes over its own images, so
each training image is used equally often. With `train.local-steps` it is steps: a pooled round takes as many as all
sites take together in a federated one, on batches of the same size; images of a small site are used more often than in
the pooled arm. Early stopping, and arms in which only some sites train in a round, are refused beside local and pooled
ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedmed import config as run_file
from fedmed.config import EvaluateConfig, RunConfig
from fedmed.errors import ConfigError
from fedmed.experiments.pooling import pooled_data
from fedmed.federated.sites import site_names

Kind = Literal["local", "federated", "pooled"]
KEPT_OF_STRATEGY = ("weight-by", "round-timeout-s", "retries", "checkpoint-every")  # by arms that federate nothing
DECLARED = ("compare", "endpoint", "family", "seeds", "resplit")  # say nothing of how a network is trained


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of an experiment."""

    arm: str
    network: str  # the arm, or "local:SITE"
    seed: int
    config: RunConfig  # what is trained
    judges: RunConfig  # whose sites' held-out patients, and whose server's test part, judge the network

    @property
    def label(self) -> str:
        """A name for folders and progress."""
        return f"{re.sub(r'[^A-Za-z0-9.=+]+', '-', self.network).strip('-')[:60]}-seed{self.seed}"


def kind_of(arm: str) -> Kind:
    """What an arm is: a name of an algorithm is federated."""
    return "local" if arm == "local" else "pooled" if arm == "pooled" else "federated"


def arms_of(config: RunConfig) -> tuple[str, ...]:
    """The arms of a comparison, in order."""
    return config.evaluate.compare or ("local", "federated", "pooled")


def seeds_of(config: RunConfig) -> tuple[int, ...]:
    """The seeds that every arm is trained with."""
    return tuple(range(config.seed, config.seed + config.evaluate.seeds))


def comparisons(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """The declared family: pairs of arms, of which the first is expected to be better.

    Without `evaluate.family`, every federated arm against pooled and against local training, where these are arms.

    Raises:
        ConfigError: a comparison is not written "ARM vs ARM", or names what is no arm.
    """
    arms = arms_of(config)
    if not config.evaluate.family:
        federated = [arm for arm in arms if kind_of(arm) == "federated"]
        return tuple((arm, other) for arm in federated for other in ("pooled", "local") if other in arms)
    pairs = []
    for text in config.evaluate.family:
        first, middle, second = text.partition(" vs ")
        if not middle or first == second or not {first, second} <= set(arms):
            raise ConfigError(f'evaluate.family: "{text}": expected "ARM vs ARM", with two of {", ".join(arms)}')
        pairs.append((first, second))
    return tuple(pairs)


def changed(config: RunConfig, sections: Mapping[str, Mapping[str, Any]], **keys: object) -> RunConfig:
    """A configuration with some keys changed, validated anew."""
    values = run_file.nested(config)
    for name, entries in sections.items():
        values[name] = {**values[name], **entries}
    return run_file.validate({**values, **keys}, source="an arm of the experiment")


def trials_of(config: RunConfig, folder: Path) -> tuple[Trial, ...]:
    """Every run of a comparison: each arm with each seed, and of `local` each site.

    All of one seed hold out the same patients: those that the run file's own seed holds out, or with
    `evaluate.resplit` those of their seed.

    Args:
        config: the run, with every path absolute.
        folder: of the experiment; the merged manifest of a pooled arm is written there.

    Raises:
        ConfigError: an arm is named twice, no algorithm has its name, or one has no network for the server's set.
        DataError: a manifest cannot be used.
    """
    arms = arms_of(config)
    if len(set(arms)) < len(arms):
        raise ConfigError("evaluate.compare: an arm is named twice; name each once")
    check_same_budget(config)
    trials = tuple(
        _trial(arm, network, trained, base, seed)
        for seed, base in bases_of(config).items()
        for arm in arms
        for network, trained in _networks(base, arm, folder)
    )
    check_judged_everywhere(trials)
    return trials


def budget_of(config: RunConfig) -> str:
    """What every arm may spend, in words."""
    rests = f"; but {resting} lets sites rest in a round" if (resting := _resting(config)) else ""
    rests += f"; but {' and '.join(stopping)} may end a training before" if (stopping := _stopping(config)) else ""
    if config.train.local_steps:
        return f"every arm takes equally many steps: a pooled round as many as all sites together{rests}"
    passes = "train.rounds times train.local-epochs passes"
    return f"every training image is used equally often in every arm: {passes}{rests}"


def check_same_budget(config: RunConfig) -> None:
    """Refuse local and pooled arms beside what lets one arm train more than another: early stopping, or resting sites.

    Raises:
        ConfigError: there are both.
    """
    arms, stopping = arms_of(config), _stopping(config)
    others = [arm for arm in arms if kind_of(arm) != "federated"]
    if others and stopping and len(arms) > 1:
        raise ConfigError(
            f"{stopping[0]} ends each training at a time of its own, so {' and '.join(others)} would not have "
            "the same budget as the other arms; set it to 0, or leave these out of evaluate.compare"
        )
    resting = _resting(config)
    if others and resting:
        raise ConfigError(
            f"{resting} lets sites rest in a round, so {' and '.join(others)} would train on more images than a "
            "federated arm; use another, or leave these out of evaluate.compare"
        )


def _stopping(config: RunConfig) -> list[str]:
    """What may end a training early."""
    counts = {"train.patience": config.train.patience, "evaluate.patience": config.evaluate.patience}
    return [key for key, count in counts.items() if count]


def _resting(config: RunConfig) -> str:
    """What lets a site rest in a round of a federated arm; nothing where none does."""
    federated = [arm for arm in arms_of(config) if kind_of(arm) == "federated"]
    if "cyclic" in federated or ("federated" in federated and config.strategy.name == "cyclic"):
        return "cyclic"
    return "strategy.fraction below 1" if federated and config.strategy.fraction < 1 else ""


def check_judged_everywhere(trials: Sequence[Trial]) -> None:
    """Refuse an algorithm that ends without a network for everybody where the server's patients judge too.

    Raises:
        ConfigError: it is FedBN, and there is a server's set.
    """
    if any(trial.config.strategy.name == "fedbn" and trial.judges.data.server for trial in trials):
        raise ConfigError(
            'strategy.name = "fedbn" ends with no network for the server\'s patients; leave data.server empty, and '
            "every site's own patients judge its own network"
        )


def bases_of(config: RunConfig) -> dict[int, RunConfig]:
    """What all runs of each seed share: one split for all of them, or with `evaluate.resplit` one for each seed."""
    base = plain(config)
    if not config.evaluate.resplit:
        return dict.fromkeys(seeds_of(config), base)
    return {seed: changed(base, {"evaluate": {"split-seed": seed}}) for seed in seeds_of(config)}


def plain(config: RunConfig) -> RunConfig:
    """The configuration with what only declares an experiment at its defaults, and who is held out pinned."""
    defaults = EvaluateConfig().model_dump(mode="json", by_alias=True)
    return changed(config, {"evaluate": {**{key: defaults[key] for key in DECLARED}, "split-seed": config.split_seed}})


def _networks(base: RunConfig, arm: str, folder: Path) -> Sequence[tuple[str, RunConfig]]:
    """(name, configuration) of every network that an arm trains."""
    kind = kind_of(arm)
    if kind == "federated":
        return [(arm, base if arm == "federated" else changed(base, {"strategy": {"name": arm}}))]
    strategy = {key: run_file.nested(base)["strategy"][key] for key in KEPT_OF_STRATEGY}
    alone = changed(base, {}, strategy={**strategy, "name": "fedavg", "min-sites": 1})
    if kind == "local":
        return [
            (f"local:{name}", changed(alone, {"data": {"sites": [path]}}))
            for name, path in zip(site_names(base), base.data.sites, strict=True)
        ]
    steps = base.train.local_steps * len(base.data.sites)
    return [("pooled", changed(alone, {"data": pooled_data(base, folder), "train": {"local-steps": steps}}))]


def _trial(arm: str, network: str, trained: RunConfig, base: RunConfig, seed: int) -> Trial:
    return Trial(arm=arm, network=network, seed=seed, config=changed(trained, {}, seed=seed), judges=base)
