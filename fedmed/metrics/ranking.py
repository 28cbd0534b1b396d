"""Exact ranking metrics of one label, also for weighted cases: ROC curve, AUROC, average precision, sensitivity.

A case whose target is NaN is unknown and left out. All metrics are undefined unless both classes are present.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
SPECIFICITY = 0.9  # of the threshold at which sensitivity is reported
SLACK = 1e-9  # 1 - 0.9 is a little less than the 1/10 that a count can reach


def auroc(scores: ArrayLike, targets: ArrayLike) -> float | None:
    """Returns the area under the ROC curve: P(score₊ > score₋) + ½ P(score₊ = score₋)  (Mann and Whitney 1947).

    Args:
        scores: (N,), higher means positive.
        targets: (N,) 0, 1 or NaN.
    """
    return _or_none(ranking_metrics(scores, targets).auroc[0])


def auprc(scores: ArrayLike, targets: ArrayLike) -> float | None:
    """Returns the average precision Σₖ (Rₖ - Rₖ₋₁) Pₖ over descending thresholds, tied scores being one threshold.

    Args:
        scores: (N,), higher means positive.
        targets: (N,) 0, 1 or NaN.
    """
    return _or_none(ranking_metrics(scores, targets).auprc[0])


def sensitivity_at_specificity(scores: ArrayLike, targets: ArrayLike) -> float | None:
    """Returns the largest sensitivity of a threshold whose specificity is at least 0.90.

    A threshold is one of the scores, or lies above them all; nothing is interpolated between two points of the curve.

    Args:
        scores: (N,), higher means positive.
        targets: (N,) 0, 1 or NaN.
    """
    return _or_none(ranking_metrics(scores, targets).sensitivity[0])


def roc_curve(scores: ArrayLike, targets: ArrayLike) -> tuple[Array, Array, Array] | None:
    """Returns the ROC curve as (false positive rates, true positive rates, thresholds), or None without both classes.

    It begins at (0, 0), whose threshold is infinity, and has one point per distinct score, in descending order.
    """
    ranked = _rank(scores, targets, None)
    true, false = ranked.true[:, 0], ranked.false[:, 0]
    if true.size == 0 or true[-1] == 0 or false[-1] == 0:
        return None
    return (
        np.concatenate(([0.0], false / false[-1])),
        np.concatenate(([0.0], true / true[-1])),
        np.concatenate(([np.inf], ranked.thresholds)),
    )


class RankingMetrics(NamedTuple):
    """AUROC, average precision, sensitivity at 0.90 specificity by column of weights; NaN where a class is absent."""

    auroc: Array  # (R,)
    auprc: Array  # (R,)
    sensitivity: Array  # (R,)


def ranking_metrics(scores: ArrayLike, targets: ArrayLike, weights: Array | None = None) -> RankingMetrics:
    """Returns the metrics for each column of case weights, at the cost of one sort.

    Args:
        scores: (N,), higher means positive.
        targets: (N,) 0, 1 or NaN.
        weights: (N, R) not negative, such as how often R resamples drew each case; by default one column of ones.
    """
    ranked = _rank(scores, targets, weights)
    return metrics_of_counts(ranked.true, ranked.false)


def metrics_of_counts(true: Array, false: Array) -> RankingMetrics:
    """Returns the metrics from the positives and negatives, (K, R), at or above each of K descending thresholds."""
    if len(true) == 0:
        undefined = np.full(true.shape[1], np.nan)
        return RankingMetrics(undefined, undefined, undefined)
    new_true = np.diff(true, axis=0, prepend=0)  # positives at the threshold itself
    new_false = np.diff(false, axis=0, prepend=0)
    positives, negatives = true[-1], false[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        # Each positive beats the negatives below its threshold, and half of those at it.
        area = np.einsum("kr,kr->r", new_true, negatives - false + 0.5 * new_false) / (positives * negatives)
        precision = true / np.maximum(true + false, np.finfo(np.float64).tiny)
        average = np.einsum("kr,kr->r", new_true, precision) / positives
        allowed = np.count_nonzero(false <= (1 - SPECIFICITY + SLACK) * negatives, axis=0)  # (R,) thresholds from above
        found = np.where(allowed > 0, true[allowed - 1, np.arange(true.shape[1])], 0)
        sensitivity = found / positives
    both = (positives > 0) & (negatives > 0)
    return RankingMetrics(area, np.where(both, average, np.nan), np.where(both, sensitivity, np.nan))


class _Ranked(NamedTuple):
    thresholds: Array  # (K,) distinct scores, descending
    true: Array  # (K, R) weight of the positives that score at least the threshold
    false: Array  # (K, R) weight of the negatives that do


def _rank(scores: ArrayLike, targets: ArrayLike, weights: Array | None) -> _Ranked:
    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)  # (N,), (N,)
    known = np.flatnonzero(~np.isnan(target))
    order = known[np.argsort(-score[known], kind="stable")]
    score, target = score[order], target[order]
    weight = np.ones((len(order), 1)) if weights is None else weights[order]  # (N, R)
    last_of_tie = np.flatnonzero(np.diff(score, append=-np.inf))
    true = np.cumsum(weight * target[:, None], axis=0)
    false = np.cumsum(weight * (1 - target)[:, None], axis=0)
    if len(last_of_tie) < len(score):
        true, false = true[last_of_tie], false[last_of_tie]
    return _Ranked(score[last_of_tie], true, false)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
