"""Exact ranking metrics of one label, also for weighted cases: ROC curve, AUROC, average precision, sensitivity.

A case whose target is NaN is unknown and left out. All metrics are undefined unless both classes are present.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

Array = NDArray[np.float64]
SPECIFICITY = 0.9  # of the threshold at which sensitivity is reported
TINY = np.finfo(np.float64).tiny
SLACK = 1e-9  # 1 - 0.9 is a little less than the 1/10 that a count can reach


def roc_curve(scores: ArrayLike, targets: ArrayLike) -> tuple[Array, Array, Array] | None:
    """Returns the ROC curve as (false positive rates, true positive rates, thresholds), or None without both classes.

    It begins at (0, 0), whose threshold is infinity, and has one point per distinct score, in descending order.
    """
    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)  # (N,), (N,)
    known = np.flatnonzero(~np.isnan(target))
    order = known[np.argsort(-score[known], kind="stable")]
    score, target = score[order], target[order]
    last_of_tie = np.flatnonzero(np.diff(score, append=-np.inf))
    true, false = np.cumsum(target)[last_of_tie], np.cumsum(1 - target)[last_of_tie]
    if true.size == 0 or true[-1] == 0 or false[-1] == 0:
        return None
    return (
        np.concatenate(([0.0], false / false[-1])),
        np.concatenate(([0.0], true / true[-1])),
        np.concatenate(([np.inf], score[last_of_tie])),
    )


class RankingMetrics(NamedTuple):
    """AUROC, average precision, sensitivity at 0.90 specificity by column of weights; NaN where a class is absent."""

    auroc: Array  # (R,)
    auprc: Array  # (R,)
    sensitivity: Array  # (R,)


def ranking_metrics(scores: ArrayLike, targets: ArrayLike, weights: Array | None = None) -> RankingMetrics:
    """Returns the metrics for each column of case weights, at the cost of one sort and one pass over them.

    AUROC is P(score₊ > score₋) + ½ P(score₊ = score₋)  (Mann and Whitney 1947). Average precision is Σₖ (Rₖ - Rₖ₋₁) Pₖ
    over descending thresholds, tied scores being one threshold. Sensitivity is the largest of a threshold whose
    specificity is at least 0.90: one of the scores, or above them all; nothing is interpolated between two points.

    Args:
        scores: (N,), higher means positive.
        targets: (N,) 0, 1 or NaN.
        weights: (N, R) not negative, such as how often R resamples drew each case; by default one column of ones.
    """
    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)  # (N,), (N,)
    weight = np.ones((len(score), 1)) if weights is None else weights
    positive, negative = np.flatnonzero(target == 1), np.flatnonzero(target == 0)
    thresholds = np.unique(score[positive])[::-1]  # (K,) descending: only scores of positives matter to the metrics
    if len(thresholds) == 0 or len(negative) == 0:
        undefined = np.full(weight.shape[1], np.nan)
        return RankingMetrics(undefined, undefined, undefined)
    first = _place(thresholds, score[negative])  # of the thresholds that a negative reaches, K where it reaches none
    tied = np.append(thresholds, np.nan)[first] == score[negative]
    new_true = _totals(_place(thresholds, score[positive]), positive, len(thresholds), weight)  # (K, R)
    steps = _totals(first, negative, len(thresholds) + 1, weight)  # (K + 1, R)
    false = np.cumsum(steps[:-1], axis=0)
    negatives = false[-1] + steps[-1]
    ties = _totals(first[tied], negative[tied], len(thresholds), weight) if tied.any() else None
    return _metrics(new_true, false, ties, negatives)


def _place(thresholds: Array, scores: Array) -> NDArray[np.intp]:
    """Returns the place of the highest of K descending thresholds that each score reaches; K if it reaches none."""
    return np.searchsorted(-thresholds, -scores, side="left")


def _totals(group: NDArray[np.intp], case: NDArray[np.intp], groups: int, weight: Array) -> Array:
    """Returns the summed weights of each group of cases, (groups, R), without copying any of them."""
    member = csr_array((np.ones(len(case)), (group, case)), shape=(groups, len(weight)))
    totals: Array = member @ weight
    return totals


def metrics_of_counts(true: Array, false: Array) -> RankingMetrics:
    """Returns the metrics from the positives and negatives, (K, R), at or above each of K descending thresholds."""
    if len(true) == 0:
        undefined = np.full(true.shape[1], np.nan)
        return RankingMetrics(undefined, undefined, undefined)
    ties = np.diff(false, axis=0, prepend=0)  # negatives at the threshold itself
    return _metrics(np.diff(true, axis=0, prepend=0), false, ties, false[-1])


def _metrics(new_true: Array, false: Array, ties: Array | None, negatives: Array) -> RankingMetrics:
    """Returns the metrics from weights at K descending thresholds, at least all those that a positive scores.

    Args:
        new_true: (K, R) of the positives at each threshold.
        false: (K, R) of the negatives at or above it.
        ties: (K, R) of the negatives at it; None if there are none.
        negatives: (R,) of all.
    """
    true = np.cumsum(new_true, axis=0)
    positives = true[-1]
    # Each positive beats the negatives below its threshold, and half of those at it.
    beaten = negatives - false if ties is None else negatives - false + 0.5 * ties
    with np.errstate(divide="ignore", invalid="ignore"):
        area = np.einsum("kr,kr->r", new_true, beaten) / (positives * negatives)
        average = np.einsum("kr,kr->r", new_true, true / np.maximum(true + false, TINY)) / positives
        allowed = np.count_nonzero(false <= (1 - SPECIFICITY + SLACK) * negatives, axis=0)  # (R,) thresholds from above
        sensitivity = np.where(allowed > 0, true[allowed - 1, np.arange(true.shape[1])], 0) / positives
    both = (positives > 0) & (negatives > 0)
    return RankingMetrics(area, np.where(both, average, np.nan), np.where(both, sensitivity, np.nan))
