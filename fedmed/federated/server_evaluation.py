"""The server's own held-out set: one part selects the network, the other is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.config import RunConfig
from fedmed.errors import DataError
from fedmed.imaging.dataset import Dataset, load_dataset
from fedmed.imaging.split import held_out
from fedmed.metrics.bootstrap import Interval, intervals_classification, intervals_segmentation
from fedmed.metrics.ranking import roc_curve
from fedmed.metrics.segmentation import join_cases, score_cases
from fedmed.training.evaluate import predictions
from fedmed.training.network import FlatNetwork
from fedmed.training.site_round import custom_dataset
from fedmed.types import Weights

Metrics = Mapping[str, Interval]


@dataclass(frozen=True)
class Judgement:
    """What the server's set says of one network."""

    metrics: Metrics  # on the test part, with intervals
    selection: float | None  # the primary metric on the selection part
    details: Mapping[str, Any]  # curves or cases of the test part, for the report


@dataclass(frozen=True)
class ServerEvaluation:
    """The server's held-out patients, loaded once."""

    config: RunConfig
    network: FlatNetwork
    data: Dataset
    selection: NDArray[np.int64]  # rows
    test: NDArray[np.int64]  # rows

    @classmethod
    def load(cls, config: RunConfig, network: FlatNetwork, cache_dir: Path | None) -> ServerEvaluation | None:
        """Load `data.server`; None when the run names none.

        Raises:
            DataError: the set cannot be used.
        """
        if not config.data.server:
            return None
        data = load_server_data(config, cache_dir)
        chooses = held_out(data.patients, share=config.evaluate.selection_share, seed=config.seed, name="server")
        test = np.flatnonzero(~chooses)
        if len(test) == 0:
            raise DataError("the server's set has no patient left to report on; lower evaluate.selection-share")
        return cls(config, network, data, np.flatnonzero(chooses), test)

    def judge(self, weights: Weights, *, replicates: int) -> Judgement:
        """Evaluate a network on both parts; intervals are percentile bootstraps by patient."""
        self.network.load_(weights)
        metrics, details = self._evaluate(self.test, replicates)
        primary = self._evaluate(self.selection, 0)[0].get(self.config.primary) if len(self.selection) else None
        return Judgement(metrics, primary.value if primary else None, details)

    def _evaluate(self, rows: NDArray[np.int64], replicates: int) -> tuple[Metrics, Mapping[str, Any]]:
        labels, patients = self.config.task.labels, [self.data.patients[row] for row in rows]
        rng = np.random.default_rng(self.config.seed)
        batches = list(predictions(self.network, self.data, rows))
        if self.config.task.kind == "segmentation":
            scored = join_cases([score_cases(logits, targets) for _, logits, targets in batches])
            cases = {label: [round(float(value), 4) for value in scored.dice[:, k]] for k, label in enumerate(labels)}
            details = {"kind": "segmentation", "labels": list(labels), "cases": cases}
            return intervals_segmentation(scored, patients, labels, replicates, rng), details
        logits = np.concatenate([logits for _, logits, _ in batches])
        targets = np.concatenate([targets for _, _, targets in batches])
        curves = {label: curve(logits[:, k], targets[:, k]) for k, label in enumerate(labels)}
        details = {"kind": "classification", "labels": list(labels), "curves": curves}
        return intervals_classification(logits, targets, patients, labels, replicates, rng), details


def load_server_data(config: RunConfig, cache_dir: Path | None) -> Dataset:
    """The server's data set: every row of it, whatever split its manifest names."""
    path = Path(config.data.server)
    if config.data.dataset:
        return custom_dataset(config.data.dataset)(path, config)
    return load_dataset(
        path,
        task=config.task,
        preset=config.data.preset,
        image_size=config.data.image_size,
        in_channels=config.model.in_channels,
        max_unreadable=config.data.max_unreadable,
        site_share=0.0,
        seed=config.seed,
        name="server",
        cache_dir=cache_dir,
    )


def curve(scores: NDArray[np.float32], targets: NDArray[np.float32]) -> dict[str, list[float]] | None:
    """A ROC curve as two lists, or None with one class only."""
    points = roc_curve(scores, targets)
    if points is None:
        return None
    false_positive_rate, true_positive_rate = points[0], points[1]
    return {
        "false_positive_rate": [round(float(value), 5) for value in false_positive_rate],
        "true_positive_rate": [round(float(value), 5) for value in true_positive_rate],
    }
