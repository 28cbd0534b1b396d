"""Percentile intervals by resampling patients (Efron and Tibshirani 1993, chapter 13; clusters: Field and Welsh 2007).

Images of one patient resemble each other, so the patient is what is drawn: a replicate draws as many patients as there
are, with replacement, and counts each image as often as its patient was drawn. Counts are weights, so a replicate is a
column of a weight matrix, and each statistic is computed for all columns at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.ranking import ranking_metrics
from fedmed.metrics.segmentation import Cases, overlap
from fedmed.metrics.sums import Array, check_cases, check_labels, check_patients, cross_entropy

Statistic = Callable[[Array], Array]  # weights (N, R) of R replicates -> values (R,) or (K, R), NaN where undefined
CELLS = 2_000_000  # images times replicates in memory at once: 16 MB
LEVEL = 0.95  # of every interval


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A metric with its 95 % interval."""

    value: float | None  # on the data as they are; None if undefined
    low: float | None  # None if there is no interval
    high: float | None
    n: int  # patients that count for this metric


def bootstrap_patients(
    statistic: Statistic, patients: Sequence[str], replicates: int, rng: np.random.Generator
) -> tuple[float | None, float | None]:
    """Returns the 2.5 % and 97.5 % points of a statistic over resampled patients.

    Replicates in which the statistic is undefined are left out.

    Args:
        statistic: Maps weights (N, R), one column per replicate, to values (R,), NaN where undefined.
        patients: N patient ids, one per image.
        replicates: How many resamples; with 0 there is no interval.
        rng: Source of the resamples.

    Returns:
        (low, high), or (None, None) if fewer than half of the replicates are defined, or there are not two patients.
    """
    return _percentiles(_replicate(statistic, patients, replicates, rng)[0], patients)


def intervals_classification(
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    labels: Sequence[str],
    replicates: int,
    rng: np.random.Generator,
) -> dict[str, Interval]:
    """Returns `loss`, `auroc`, `auroc/<label>`, `auprc` and `auprc/<label>` with intervals, from the same resamples.

    The values are exact, where those of `classification_metrics` come from histograms. As there, `auroc` is the mean
    over the labels that have both classes, in each replicate anew. A patient counts for a label if any of its images
    has a known target.

    Args:
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids.
        labels: L names.
        replicates: How many resamples; with 0 only values are computed.
        rng: Source of the resamples.

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    check_labels(labels, logits.shape[1])
    known = ~np.isnan(targets)  # (N, L)
    loss = np.where(known, cross_entropy(logits.astype(np.float64), np.where(known, targets, 0)), 0)

    def statistic(weights: Array) -> Array:
        ranking = [ranking_metrics(logits[:, i], targets[:, i], weights) for i in range(len(labels))]
        auroc = np.reshape([metrics.auroc for metrics in ranking], (len(labels), -1))
        auprc = np.reshape([metrics.auprc for metrics in ranking], (len(labels), -1))
        mean_loss = _quotient(loss.sum(axis=1) @ weights, known.sum(axis=1) @ weights)
        return np.vstack((mean_loss, _mean(auroc), auroc, _mean(auprc), auprc))

    names = ["loss", "auroc", *(f"auroc/{label}" for label in labels)]
    names += ["auprc", *(f"auprc/{label}" for label in labels)]
    anywhere = known.any(axis=1)[:, None]
    counts = np.hstack((anywhere, anywhere, known, anywhere, known))  # (N, K)
    return _intervals(names, statistic, counts, patients, replicates, rng)


def intervals_segmentation(
    cases: Cases, patients: Sequence[str], labels: Sequence[str], replicates: int, rng: np.random.Generator
) -> dict[str, Interval]:
    """Returns every metric of `segmentation_metrics` with its interval, from the same resamples.

    Args:
        cases: Scores of N cases and L labels.
        patients: N patient ids.
        labels: L names.
        replicates: How many resamples; with 0 only values are computed.
        rng: Source of the resamples.

    Raises:
        DataError: If there is not one patient for each case and one name for each label.
    """
    check_patients(patients, len(cases.loss))
    check_labels(labels, cases.total.shape[1])

    def statistic(weights: Array) -> Array:
        count = weights.sum(axis=0)  # (R,)
        intersection, total = cases.intersection.T @ weights, cases.total.T @ weights  # (L, R), (L, R)
        dice = _quotient(cases.dice.T @ weights, count)
        pooled = overlap(2 * intersection.sum(axis=0), total.sum(axis=0))
        micro = overlap(2 * intersection, total)
        iou = overlap(intersection, total - intersection)
        rows = np.vstack((_quotient(cases.loss @ weights, count), _mean(dice), dice, pooled, micro, _mean(iou), iou))
        return np.where(count > 0, rows, np.nan)

    names = ["loss"]
    for metric in ("dice", "micro-dice", "iou"):
        names += [metric, *(f"{metric}/{label}" for label in labels)]
    counts = np.ones((len(cases.loss), len(names)), dtype=np.bool_)
    return _intervals(names, statistic, counts, patients, replicates, rng)


def _intervals(
    names: Sequence[str],
    statistic: Statistic,
    counts: NDArray[np.bool_],
    patients: Sequence[str],
    replicates: int,
    rng: np.random.Generator,
) -> dict[str, Interval]:
    """Judges each of K metrics by the patients with an image that `counts` (N, K) for it."""
    values = statistic(np.ones((len(patients), 1)))[:, 0]  # (K,)
    drawn = _replicate(statistic, patients, replicates, rng)  # (K, replicates)
    ids = np.asarray(patients)
    result = {}
    for k, name in enumerate(names):
        counted = ids[counts[:, k]]
        defined = not np.isnan(values[k])
        low, high = _percentiles(drawn[k], counted) if defined else (None, None)
        result[name] = Interval(
            value=float(values[k]) if defined else None, low=low, high=high, n=len(np.unique(counted))
        )
    return result


def _replicate(statistic: Statistic, patients: Sequence[str], replicates: int, rng: np.random.Generator) -> Array:
    """Returns the statistic of each resample, (K, replicates)."""
    distinct, patient = np.unique(np.asarray(patients), return_inverse=True)  # (P,), (N,)
    rows = [np.atleast_2d(statistic(np.ones((len(patient), 1))))[:, :0]]  # (K, 0): tells K without replicates too
    at_once = max(1, CELLS // max(1, len(patient)))
    for start in range(0, replicates if len(distinct) else 0, at_once):
        count = min(at_once, replicates - start)
        draws = rng.integers(len(distinct), size=(count, len(distinct)))  # (R, P) patients drawn
        cells = draws * count + np.arange(count)[:, None]
        times = np.bincount(cells.ravel(), minlength=len(distinct) * count).reshape(len(distinct), count)  # (P, R)
        rows.append(np.atleast_2d(statistic(times[patient].astype(np.float64))))
    return np.concatenate(rows, axis=1)


def _percentiles(values: Array, patients: Sequence[str] | NDArray[np.str_]) -> tuple[float | None, float | None]:
    """Returns (low, high) of replicates (R,), as `bootstrap_patients` defines them."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0 or 2 * len(defined) < len(values) or len(set(patients)) < 2:
        return None, None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _quotient(numerator: Array, denominator: Array) -> Array:
    """Returns the quotient, NaN where the denominator is 0."""
    full = np.broadcast_to(denominator, np.shape(numerator))
    quotient: Array = np.divide(numerator, full, out=np.full(np.shape(numerator), np.nan), where=full > 0)
    return quotient


def _mean(values: Array) -> Array:
    """Returns the mean (R,) over labels of (L, R), leaving out NaN; NaN if all are."""
    defined = ~np.isnan(values)
    return _quotient(np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0))
