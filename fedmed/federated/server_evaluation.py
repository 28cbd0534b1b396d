"""The server's own held-out set: one part selects the network, the other is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmed.config import RunConfig
from fedmed.errors import DataError
from fedmed.federated.evaluation_details import classification_details, segmentation_details
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.split import held_out
from fedmed.metrics import (
    Cases,
    Interval,
    bin_centres,
    classification_intervals,
    join_cases,
    segmentation_intervals,
)
from fedmed.training.case_pictures import Extremes
from fedmed.training.evaluate import predictions, scored_cases
from fedmed.training.network import FlatNetwork
from fedmed.training.run_data import run_data
from fedmed.types import Weights

Metrics = Mapping[str, Interval]
Scores = Cases | tuple[NDArray[np.float32], NDArray[np.float32]]  # of images: overlaps, or logits and targets (N, L)


@dataclass(frozen=True)
class Judgement:
    """What the server's set says of one network."""

    metrics: Metrics  # on the test part, with intervals
    selection: float | None  # the primary metric on the selection part
    scores: Scores  # of the test part
    patients: tuple[str, ...] = field(default=(), repr=False)  # one per score
    chosen_on: Scores | None = None  # the scores of the selection part, which choose thresholds
    extremes: Extremes = field(default_factory=Extremes, repr=False)  # best and worst segmented cases of the test part

    @property
    def centres(self) -> tuple[float, ...]:
        """The middle of each label's logits, which tells sites where histograms must be finest; none for masks."""
        return () if isinstance(self.scores, Cases) else tuple(bin_centres(self.scores[0]))


@dataclass(frozen=True)
class ServerEvaluation:
    """The server's held-out patients, loaded once."""

    config: RunConfig
    network: FlatNetwork
    data: Dataset
    chooses: NDArray[np.bool_]  # (N,) images of the selection part; the others are the test part

    @classmethod
    def load(cls, config: RunConfig, network: FlatNetwork, cache_dir: Path | None) -> ServerEvaluation | None:
        """Load `data.server`; None when the run names none.

        Raises:
            DataError: the set cannot be used.
        """
        if not config.data.server:
            return None
        data = load_server_data(config, cache_dir)
        chooses = chosen_by(config, data)
        if chooses.all():
            raise DataError("the server's set has no patient left to report on; lower evaluate.selection-share")
        return cls(config, network, data, chooses)

    def few(self) -> Tensor:
        """Up to eight images (n, C, …), as the network is given them."""
        rows = np.arange(min(8, len(self.data)))
        return self.data.batch(rows, margin=self.network.margin_voxels)[0]

    def judge(self, weights: Weights, *, replicates: int, distances: bool = False) -> Judgement:
        """Evaluate a network on both parts in one pass.

        Args:
            weights: the network.
            replicates: of the percentile bootstrap by patient behind each interval.
            distances: whether to measure distances between surfaces, which takes longer than all else.
        """
        self.network.load_(weights)
        test, selection, extremes = _Part([], []), _Part([], []), Extremes()
        for rows, logits, targets in predictions(self.network, self.data, np.arange(len(self.data))):
            for part, mine in ((selection, self.chooses[rows]), (test, ~self.chooses[rows])):
                if mine.any():
                    part.scores.append(scored := self._scored(logits[mine], targets[mine], distances))
                    if part is test and isinstance(scored, Cases):
                        extremes.add(rows[mine], scored.dice.mean(axis=1), logits[mine], targets[mine])
                    part.patients.extend(self.data.patients[row] for row in rows[mine])
        scores = _joined(test.scores)
        metrics = self._metrics(scores, test.patients, replicates)
        primary, chosen_on = None, _joined(selection.scores) if selection.scores else None
        if chosen_on is not None:
            primary = self._metrics(chosen_on, selection.patients, 0).get(self.config.primary)
        value = primary.value if primary else None
        return Judgement(metrics, value, scores, tuple(test.patients), chosen_on, extremes)

    def details(self, judgement: Judgement) -> Mapping[str, Any]:
        """Curves or cases of the test part, for the report: the content of `evaluation.json`."""
        labels, scores, patients = self.config.task.labels, judgement.scores, judgement.patients
        if isinstance(scores, Cases):
            return segmentation_details(scores, patients, labels, judgement.extremes.pictures(self.data))
        selection = None if isinstance(judgement.chosen_on, Cases) else judgement.chosen_on
        return classification_details(
            scores, patients, labels, selection, replicates=self.config.evaluate.bootstrap, seed=self.config.seed
        )

    def _scored(self, logits: NDArray[np.float32], targets: NDArray[np.float32], distances: bool) -> Scores:
        if self.config.task.kind == "classification":
            return logits, targets
        return scored_cases(logits, targets, self.config.scored_spacing_mm if distances else ())

    def _metrics(self, scores: Scores, patients: Sequence[str], replicates: int) -> Metrics:
        labels, rng = self.config.task.labels, np.random.default_rng(self.config.seed)
        if isinstance(scores, Cases):
            return segmentation_intervals(scores, patients, labels, replicates, rng)
        return classification_intervals(*scores, patients, labels, replicates, rng)


class _Part(NamedTuple):
    """The scores of one part of the set, batch by batch, and whose they are."""

    scores: list[Scores]
    patients: list[str]


def _joined(scores: Sequence[Scores]) -> Scores:
    """The scores of several batches as one."""
    cases = [each for each in scores if isinstance(each, Cases)]
    if cases:
        return join_cases(cases)
    logits, targets = zip(*scores, strict=True)
    return np.concatenate(logits), np.concatenate(targets)


def chosen_by(config: RunConfig, data: Dataset) -> NDArray[np.bool_]:
    """Which items of the server's set, (N,), belong to the patients that select the network; the others judge it."""
    return held_out(data.patients, share=config.evaluate.selection_share, seed=config.split_seed, name="server")


def server_device(config: RunConfig) -> str:
    """The device of the server's evaluation."""
    cuda = config.simulation.device == "cuda" or (config.simulation.device == "auto" and torch.cuda.is_available())
    return "cuda" if cuda else "cpu"


def load_server_data(config: RunConfig, cache_dir: Path | None) -> Dataset:
    """The server's data set: every row of it, whatever split its manifest names."""
    return run_data(
        Path(config.data.server),
        config,
        name="server",
        dataset=config.data.dataset,
        site_share=0.0,
        seed=config.seed,
        cache_dir=cache_dir,
        cache_gib=config.data.cache_gib,
    )
