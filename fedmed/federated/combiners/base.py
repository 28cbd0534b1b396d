"""What every combiner is, and what is done to an update before any of them sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fedmed.config import StrategyConfig
from fedmed.errors import UpdateRefused
from fedmed.federated.aggregation import Aggregate, Contribution, chunks
from fedmed.federated.central import ServerNoise
from fedmed.federated.strategies.base import ServerStep, State
from fedmed.types import FloatVector, Layout, Update, Weights


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """On what terms the updates of one round are combined."""

    layout: Layout
    sent: Weights  # what the sites started from
    step: ServerStep
    state: State
    strategy: StrategyConfig
    known: int  # sites of the federation, whether they answer or not
    round: int = 0
    plateau: float = 1.0  # factor of the learning rate that the sites were sent
    noise: ServerNoise | None = None  # of a run with central privacy
    folder: Path | None = None  # where updates wait on disk if a rule must see them side by side; None = the system's


class Combiner(Protocol):
    """Takes the validated updates of one round one by one, and says what they agree on."""

    def add(self, site: str, update: Update, weights: Weights) -> None:
        """Take one update; everything is only read, and free to go afterwards.

        Raises:
            UpdateRefused: it lacks something that the algorithm needs. The combiner is as before.
        """
        ...

    def too_few(self) -> str | None:
        """Why these updates are too few to be combined, or None."""
        ...

    def result(self) -> Aggregate:
        """What the updates agree on; the combiner is spent afterwards.

        Raises:
            UpdateRefused: nothing was added.
        """
        ...


def contribution_of(terms: RoundTerms, site: str, update: Update, weights: Weights) -> Contribution:
    """What an update counts for, and by what its change is to be multiplied.

    Clipping is Δ ← Δ · min(1, C/‖Δ‖₂) over all parameters (Sun et al. 2019, arXiv:1911.07963, section 5), before
    anything else; buffers are not clipped.

    Raises:
        UpdateRefused: its weight is no positive number, or it lacks something that the algorithm needs.
    """
    bound, scale, clipped = terms.strategy.clip_norm, terms.step.admit(update), False
    if bound:
        norm = change_norm(weights.parameters, terms.sent.parameters)
        clipped = norm > bound
        scale *= bound / norm if clipped else 1.0
    weight = weight_of(update, terms.strategy.weight_by)
    return Contribution(site=site, weight=weight, facts=update.facts, scale=scale, clipped=clipped)


def weight_of(update: Update, by: str) -> float:
    """The weight that `strategy.weight-by` gives an update, which a site only claims.

    Raises:
        UpdateRefused: it is not a number of at least 1.
    """
    if by == "uniform":
        return 1.0
    claimed = update.facts.get("patients") if by == "patients" else update.num_examples
    if not isinstance(claimed, int | float) or not 1 <= claimed < math.inf:
        raise UpdateRefused(f"the update does not say how many {by} it is of")
    return float(claimed)


def change_norm(parameters: FloatVector, sent: FloatVector) -> float:
    """‖w - w_sent‖₂, without a temporary of the vectors' size."""
    total = 0.0
    for part in chunks(sent.size):
        change = np.subtract(parameters[part], sent[part], dtype=np.float64)
        total += float(np.dot(change, change))
    return math.sqrt(total)
