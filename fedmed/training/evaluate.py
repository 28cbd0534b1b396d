"""Evaluation: logits of a network over a data set, and the sums or the intervals that they amount to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedmed.config import TaskConfig
from fedmed.imaging.dataset import Dataset
from fedmed.metrics import (
    case_sums,
    classification_metrics,
    classification_sums,
    join_cases,
    score_cases,
    segmentation_metrics,
)
from fedmed.training.network import FlatNetwork
from fedmed.types import Sums

BATCH_SIZE = 32  # images in one forward pass; memory, not accuracy, depends on it


def predictions(
    network: FlatNetwork, data: Dataset, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]:
    """Yield (rows, logits, targets) batch by batch, in order, the network in evaluation mode."""
    network.module.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_SIZE):
            chosen = rows[start : start + BATCH_SIZE]
            images, targets = data.batch(chosen)
            logits = network.module(images.to(network.device))
            yield chosen, logits.float().cpu().numpy(), targets.numpy()


def evaluation_sums(network: FlatNetwork, data: Dataset, rows: NDArray[np.int64], task: TaskConfig) -> Sums:
    """What a site sends of its evaluation: counts, histograms and summed losses, never a ratio or a case.

    Made once from all cases and not added up over batches: a patient with images in two batches counts once.
    """
    patients = [data.patients[row] for row in rows]
    if task.kind == "segmentation":
        scored = [score_cases(logits, targets) for _, logits, targets in predictions(network, data, rows)]
        return case_sums(join_cases(scored), patients)
    batches = list(predictions(network, data, rows))
    logits = np.concatenate([logits for _, logits, _ in batches])
    targets = np.concatenate([targets for _, _, targets in batches])
    return classification_sums(logits, targets, patients)


def metrics_from(sums: Sums, task: TaskConfig) -> Mapping[str, float | None]:
    """The ratios that sums amount to, named as in `result.json`; undefined ones are None."""
    ratios = classification_metrics if task.kind == "classification" else segmentation_metrics
    return ratios(sums, task.labels)
