"""Curves of one data set with bands over patients: ROC, precision-recall, calibration, and one threshold's table.

Everything that a resample needs is a sum over images, so one sparse matrix turns the weights of all resamples into the
counts of all labels at once. A band is pointwise: at each place of the grid it holds 95 % of the resampled curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from fedmed.metrics.calibration import CALIBRATION_BINS, calibration_bins, probabilities
from fedmed.metrics.obuchowski import MINIMUM
from fedmed.metrics.ranking import roc_curve
from fedmed.metrics.resampling import LEVEL, Interval, patients_with, replicate
from fedmed.metrics.sums import Array, check_cases, check_patients, quotient

GRID = np.linspace(0, 1, 51)  # false positive rates, or recalls, at which a band is computed
QUANTILES = 100  # of positives and of negatives: the thresholds at which resampled curves are evaluated
RATES = ("sensitivity", "specificity", "positive-predictive-value", "negative-predictive-value")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An exact curve, and its band over `GRID`; none with fewer than `MINIMUM` patients of a class or no resamples."""

    x: Array  # (K,)
    y: Array  # (K,)
    low: Array | None  # (51,), NaN where undefined
    high: Array | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The bins of the probability that hold an image: what was predicted and what was true."""

    probability: Array  # (B,) mean
    observed: Array  # (B,) share of positives
    low: Array | None  # (B,) of the share
    high: Array | None
    images: Array  # (B,)


@dataclass(frozen=True, kw_only=True)
class LabelCurves:
    """What the cases of one label show."""

    roc: Curve | None  # None with one class only
    precision_recall: Curve | None
    calibration: Calibration
    confusion: tuple[int, int, int, int]  # true positives, false negatives, false positives, true negatives
    rates: dict[str, Interval]  # at the threshold, by RATES


def youden_threshold(scores: NDArray[np.floating], targets: NDArray[np.floating]) -> float | None:
    """Returns the score with the largest sensitivity + specificity - 1 (Youden 1950), of equals the highest.

    Args:
        scores: (N,), higher means positive.
        targets: (N,) 0, 1 or NaN.

    Returns:
        A score at or above which a case is called positive; None without both classes.
    """
    points = roc_curve(scores, targets)
    return None if points is None else float(points[2][1:][np.argmax((points[1] - points[0])[1:])])


def precision_recall_curve(scores: NDArray[np.floating], targets: NDArray[np.floating]) -> tuple[Array, Array] | None:
    """Returns the curve as (recalls, precisions), or None without both classes.

    One point per distinct score of a positive, from the highest down: recall rises with every point and ends at 1.
    `auprc` is the area under the steps that end at these points.
    """
    points = roc_curve(scores, targets)
    if points is None:
        return None
    false, true = points[0][1:] * np.count_nonzero(targets == 0), points[1][1:] * np.count_nonzero(targets == 1)
    rises = np.diff(true, prepend=0) > 0
    return points[1][1:][rises], (true / (true + false))[rises]


def label_curves(
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    thresholds: Sequence[float],
    replicates: int,
    rng: np.random.Generator,
) -> list[LabelCurves]:
    """Returns the curves of every label, all bands from the same resamples of patients.

    Args:
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids.
        thresholds: L logits at or above which a case is called positive.
        replicates: How many resamples; with 0 there are no bands.
        rng: Source of the resamples.

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    labels = [_Label.of(logits[:, k], targets[:, k], threshold) for k, threshold in enumerate(thresholds)]
    if not labels:
        return []
    matrix = vstack([label.counted for label in labels], format="csr")
    ends = np.cumsum([0, *(label.counted.shape[0] for label in labels)])

    def statistic(weights: Array) -> Array:
        counts = matrix @ weights  # (rows of all labels, R)
        return np.concatenate(
            [label.points(counts[start:end]) for label, start, end in zip(labels, ends, ends[1:], strict=False)]
        )

    points = len(GRID) * 2 + CALIBRATION_BINS + len(RATES)
    drawn = replicate(statistic, patients, replicates if len(set(patients)) > 1 else 0, rng)
    bands = _percentiles(drawn).reshape(len(labels), points, 2)
    return [
        label.result(logits[:, k], targets[:, k], patients, bands[k] if drawn.shape[1] else None)
        for k, label in enumerate(labels)
    ]


@dataclass(frozen=True)
class _Label:
    """The rows of one label's counts: positives by threshold, negatives by threshold, bins twice, confusion."""

    counted: csr_array  # (rows, N) what each image adds to each count
    edges: int  # thresholds

    @classmethod
    def of(cls, scores: NDArray[np.floating], target: NDArray[np.floating], threshold: float) -> _Label:
        known = ~np.isnan(target)
        positive, negative = target == 1, target == 0
        of_each = [np.quantile(scores[c], np.linspace(0, 1, QUANTILES)) for c in (positive, negative) if c.any()]
        edges = np.unique(np.concatenate([*of_each, [scores.min(initial=0.0) - 1]]))[::-1]  # descending; the last: all
        reached = np.searchsorted(-edges, -scores.astype(np.float64))  # the highest threshold that a case passes
        at = reached == np.arange(len(edges))[:, None]  # (T, N)
        bins = calibration_bins(probabilities(scores)) == np.arange(CALIBRATION_BINS)[:, None]
        called = scores >= threshold
        cells = (positive & called, positive & ~called, negative & called, negative & ~called)
        rows = [at & positive, at & negative, bins & known, bins & positive, np.stack(cells)]
        return cls(csr_array(np.concatenate(rows)).astype(np.float64), len(edges))

    def points(self, counts: Array) -> Array:
        """Counts (rows, R) as what bands are drawn of: (51 + 51 + 15 + 4, R), NaN where undefined."""
        edges = self.edges
        true, false = np.cumsum(counts[:edges], axis=0), np.cumsum(counts[edges : 2 * edges], axis=0)
        count, positives = np.split(counts[2 * edges : 2 * edges + 2 * CALIBRATION_BINS], 2)
        curves = np.full((2 * len(GRID), counts.shape[1]), np.nan)
        recall, fall_out = quotient(true, true[-1]), quotient(false, false[-1])
        precision = quotient(true, true + false)
        for each in np.flatnonzero((true[-1] > 0) & (false[-1] > 0)):
            curves[: len(GRID), each] = np.interp(GRID, np.append(0, fall_out[:, each]), np.append(0, recall[:, each]))
            first = np.searchsorted(recall[:, each], np.maximum(GRID, np.finfo(np.float64).tiny))
            curves[len(GRID) :, each] = precision[np.minimum(first, edges - 1), each]
        return np.concatenate((curves, quotient(positives, count), _rates(counts[-4:])))

    def result(
        self,
        scores: NDArray[np.floating],
        target: NDArray[np.floating],
        patients: Sequence[str],
        bands: Array | None,
    ) -> LabelCurves:
        """Exact values of the data as they are, with their bands (points, 2) if there are any."""
        known = ~np.isnan(target)
        bins = calibration_bins(probabilities(scores[known]))
        images = np.bincount(bins, minlength=CALIBRATION_BINS).astype(np.float64)
        sums = np.bincount(bins, weights=probabilities(scores[known]), minlength=CALIBRATION_BINS)
        positives = np.bincount(bins, weights=target[known], minlength=CALIBRATION_BINS)
        held, width = images > 0, len(GRID)
        of_bins = None if bands is None else bands[2 * width : -len(RATES)][held]
        cells = self.counted.sum(axis=1)[-4:]
        values = _rates(cells[:, None])[:, 0]
        hit, missed, false_alarm, passed = self.counted[-4:].toarray() > 0  # (N,) each
        asked = (hit | missed, passed | false_alarm, hit | false_alarm, passed | missed)
        whose = patients_with(np.stack(asked, axis=1), patients)  # (4,) of the images that each rate is a share of
        ranked = bands if whose[:2].min() >= MINIMUM else None
        roc, precision_recall = roc_curve(scores, target), precision_recall_curve(scores, target)
        return LabelCurves(
            roc=None if roc is None else _curve(roc[0], roc[1], None if ranked is None else ranked[:width]),
            precision_recall=None
            if precision_recall is None
            else _curve(*precision_recall, None if ranked is None else ranked[width : 2 * width]),
            calibration=Calibration(
                probability=sums[held] / images[held],
                observed=positives[held] / images[held],
                low=None if of_bins is None else of_bins[:, 0],
                high=None if of_bins is None else of_bins[:, 1],
                images=images[held],
            ),
            confusion=(int(cells[0]), int(cells[1]), int(cells[2]), int(cells[3])),
            rates={
                name: _interval(values[k], None if bands is None else bands[k - len(RATES)], int(whose[k]))
                for k, name in enumerate(RATES)
            },
        )


def _rates(cells: Array) -> Array:
    """Sensitivity, specificity, and both predictive values, (4, R), of the four cells (4, R)."""
    hit, missed, false_alarm, passed = cells
    return np.stack(
        [
            quotient(hit, hit + missed),
            quotient(passed, passed + false_alarm),
            quotient(hit, hit + false_alarm),
            quotient(passed, passed + missed),
        ]
    )


def _curve(x: Array, y: Array, band: Array | None) -> Curve:
    return Curve(x=x, y=y, low=None if band is None else band[:, 0], high=None if band is None else band[:, 1])


def _interval(value: float, band: Array | None, patients: int) -> Interval:
    """Returns a rate with its band (2,); at 0 and 1, where all resamples are alike, with an exact interval.

    At 1 it begins at (α/2)^(1/n), at 0 it ends at 1 - (α/2)^(1/n), n patients being found or missed as one each
    (Clopper and Pearson 1934, Biometrika 26(4)).
    """
    if np.isnan(value):
        return Interval(value=None, low=None, high=None, n=patients)
    bounded = band is not None and not np.isnan(band).any()
    low, high = (float(band[0]), float(band[1])) if band is not None and bounded else (None, None)
    if bounded and value in (0, 1):
        reach = ((1 - LEVEL) / 2) ** (1 / patients)
        low, high = (reach, 1.0) if value == 1 else (0.0, 1 - reach)
    return Interval(value=float(value), low=low, high=high, n=patients)


def _percentiles(drawn: Array) -> Array:
    """(K, 2) ends of the central 95 % of each row of replicates; NaN where fewer than half of them are defined."""
    ends = np.full((len(drawn), 2), np.nan)
    if not drawn.shape[1]:
        return ends
    levels = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    missing = np.isnan(drawn).sum(axis=1)
    whole = missing == 0
    ends[whole] = np.quantile(drawn[whole], levels, axis=1).T
    for row in np.flatnonzero((missing > 0) & (2 * missing <= drawn.shape[1])):
        ends[row] = np.quantile(drawn[row][~np.isnan(drawn[row])], levels)
    return ends
