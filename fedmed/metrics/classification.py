"""Classification with several labels: the sums that a site sends, and the metrics that the server computes from them.

A site sends no score of any patient: only, for each label, how many positives and negatives fell into each of 4096
bins of the logit. Two scores in one bin count as tied. The bins are 1/128 wide and end at ±16, where the probability is
within 10⁻⁶ of 0 or 1; a network whose logits all lie within a few bins (one that was hardly trained, say) is judged
more coarsely than by `ranking.auroc`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.ranking import RankingMetrics, auprc, auroc, metrics_of_counts, roc_curve
from fedmed.metrics.sums import (
    Array,
    Metrics,
    check_cases,
    check_labels,
    check_patients,
    cross_entropy,
    mean_of_defined,
    ratio,
)
from fedmed.types import Sums

__all__ = ["BINS", "LIMIT", "auprc", "auroc", "classification_metrics", "classification_sums", "roc_curve"]

BINS = 4096
LIMIT = 16.0  # logits are clipped to ±LIMIT


def classification_sums(
    logits: NDArray[np.floating], targets: NDArray[np.floating], patients: Sequence[str]
) -> dict[str, Array]:
    """Returns what a site contributes to the metrics; sums over sites equal the sums of the pooled images.

    Args:
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids. Only their number leaves this function.

    Returns:
        `loss` (1,), cross-entropy summed over known entries; `known` (1,), their number; `positives` and `negatives`
        (L * 4096,), histograms of the logits, label after label; `patients` (1,), distinct ones; `images` (1,).

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    known = ~np.isnan(targets)
    loss = cross_entropy(logits.astype(np.float64)[known], targets.astype(np.float64)[known])
    return {
        "loss": np.array([loss.sum()]),
        "known": np.array([known.sum()], dtype=np.float64),
        "positives": _histograms(logits, targets == 1),
        "negatives": _histograms(logits, targets == 0),
        "patients": np.array([len(set(patients))], dtype=np.float64),
        "images": np.array([len(logits)], dtype=np.float64),
    }


def classification_metrics(sums: Sums, labels: Sequence[str]) -> Metrics:
    """Returns the metrics of pooled sums.

    Args:
        sums: From `classification_sums`, added over sites.
        labels: L names, in the order of the logits.

    Returns:
        `loss`, the mean cross-entropy over known entries; `auroc/<label>` and `auprc/<label>`; `auroc` and `auprc`,
        their means over the labels with both classes. None where undefined.

    Raises:
        DataError: If the sums are those of another number of labels.
    """
    check_labels(labels, len(sums["positives"]) // BINS)
    ranking = _ranking(sums, len(labels))
    area = [None if np.isnan(value) else float(value) for value in ranking.auroc]
    average = [None if np.isnan(value) else float(value) for value in ranking.auprc]
    return {
        "loss": ratio(sums["loss"][0], sums["known"][0]),
        "auroc": mean_of_defined(area),
        **{f"auroc/{label}": value for label, value in zip(labels, area, strict=True)},
        "auprc": mean_of_defined(average),
        **{f"auprc/{label}": value for label, value in zip(labels, average, strict=True)},
    }


def _ranking(sums: Sums, labels: int) -> RankingMetrics:
    """Treats every label as one column and every bin as one threshold.

    Average precision counts half of a bin's cases before its middle positive, as AUROC does. Counting them all first,
    as scikit-learn does with tied scores, would be off by up to 0.01 for a few hundred images whose scores all differ.
    """
    positives = sums["positives"].reshape(labels, BINS)[:, ::-1].T  # (4096, L), highest bin first
    negatives = sums["negatives"].reshape(labels, BINS)[:, ::-1].T
    true, false = np.cumsum(positives, axis=0), np.cumsum(negatives, axis=0)
    middle_true = true - (positives - 1) / 2
    middle_false = false - negatives / 2
    exact = metrics_of_counts(true, false)
    average = (positives * middle_true / (middle_true + middle_false)).sum(axis=0) / np.maximum(true[-1], 1)
    return RankingMetrics(exact.auroc, np.where(np.isnan(exact.auprc), np.nan, average))


def _histograms(logits: NDArray[np.floating], chosen: NDArray[np.bool_]) -> Array:
    """Returns (L * 4096,) counts of the chosen (N, L) logits by label and bin."""
    position = (logits.astype(np.float64) + LIMIT) * (BINS / (2 * LIMIT))
    bins = np.clip(np.floor(position), 0, BINS - 1).astype(np.int64)  # (N, L)
    cells = bins + BINS * np.arange(logits.shape[1])
    return np.bincount(cells[chosen], minlength=BINS * logits.shape[1]).astype(np.float64)
