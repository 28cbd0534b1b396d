"""Rounds without sites: made-up changes go through a combiner and a server step."""

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.federated.admission import validated_weights
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.combiners import Combiner, RoundTerms, combiner
from fedmed.federated.strategies import server_step
from fedmed.training.network import layout_of
from fedmed.types import Layout, Update, Weights

LINEAR = layout_of(nn.Linear(5, 3))  # 18 parameters, no buffers
NORMED = layout_of(nn.BatchNorm1d(3))  # 6 parameters; 3 running means, 3 running variances, 1 counter
SGD = {"optimizer": "sgd", "weight-decay": 0.0}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a made-up site sends."""

    site: str
    change: np.ndarray
    images: int = 1
    facts: dict = field(default_factory=dict)
    buffers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def run_of(name: str = "fedavg", train: dict | None = None, **strategy: object) -> RunConfig:
    keys = {key.replace("_", "-"): value for key, value in strategy.items()}
    strategy = {"name": name, "max-weight-share": 1.0, **keys}
    return run_file.validate({"train": {**SGD, **(train or {})}, "strategy": strategy})


def zeros(layout: Layout) -> Weights:
    return Weights(
        parameters=np.zeros(layout.num_parameters, np.float32), buffers=np.zeros(layout.num_buffers, np.float32)
    )


def terms_of(config: RunConfig, layout: Layout = LINEAR, current: Weights | None = None, **more: object) -> RoundTerms:
    step = server_step(config)
    given = {"state": step.start(layout), "known": 0, **more}
    return RoundTerms(layout=layout, sent=current or zeros(layout), step=step, strategy=config.strategy, **given)


def add(combined: Combiner, current: Weights, layout: Layout, sent: Sent) -> None:
    """As the round loop does with a reply."""
    weights = Weights(parameters=current.parameters + sent.change.astype(np.float32), buffers=sent.buffers)
    update = Update(weights=weights, layout=layout.hash, num_examples=sent.images, facts=sent.facts)
    combined.add(sent.site, update, validated_weights(update, layout))


def combined_of(config: RunConfig, *updates: Sent, layout: Layout = LINEAR, **more: object) -> Aggregate:
    terms = terms_of(config, layout, **more)
    combined = combiner(terms)
    for sent in updates:
        add(combined, terms.sent, layout, sent)
    return combined.result()


def after(config: RunConfig, *rounds: list[Sent], known: int = 0, current: Weights | None = None):
    """(weights, state) after some rounds of updates."""
    step = server_step(config)
    current, state = current or zeros(LINEAR), step.start(LINEAR)
    for round, updates in enumerate(rounds, start=1):
        aggregate = combined_of(config, *updates, current=current, state=state, known=known, round=round)
        current, state = step(current, aggregate, state)
    return current, state


def made_up(count: int, seed: int = 0, size: int = LINEAR.num_parameters, spread: float = 1.0) -> list[Sent]:
    """Updates of sites a, b, c … around one direction, with different weights."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=size)
    return [
        Sent(site=chr(97 + number), change=centre + spread * rng.normal(size=size), images=int(rng.integers(1, 100)))
        for number in range(count)
    ]
