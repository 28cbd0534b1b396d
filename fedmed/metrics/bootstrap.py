"""Every metric with its interval over patients, computed from the cases themselves: for the server's own set.

The values are exact, where those that sites' sums amount to come from histograms. All metrics of one call come from the
same resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.calibration import (
    CALIBRATION_BINS,
    calibration_bins,
    ece_of_sums,
    probabilities,
    squared_errors,
)
from fedmed.metrics.cases import Cases, overlap
from fedmed.metrics.classification import SENSITIVITY, f1
from fedmed.metrics.obuchowski import MINIMUM
from fedmed.metrics.ranking import ranking_metrics
from fedmed.metrics.resampling import Interval, Statistic, intervals, patients_with
from fedmed.metrics.sums import Array, check_cases, check_labels, check_patients, cross_entropy, quotient

RANKING = ("auroc", "auprc", SENSITIVITY)  # the metrics of labels that take patients of both classes, first of all
UNLIMITED = ("loss", "hd95", "assd", "hd95-excluded", "lesion-false-positives")  # every other metric is 1 at most


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The K metrics of N judged images or cases, as one function of how often each of them counts."""

    names: tuple[str, ...]  # K
    statistic: Statistic  # weights (N, R) -> values (K, R), NaN where undefined
    counts: NDArray[np.bool_]  # (N, K) whether an image counts for a metric
    classes: tuple[NDArray[np.bool_], ...] = ()  # (N, L) of positive and of negative images, where labels are ranked

    @property
    def highest(self) -> Array:
        """The largest value that each metric can have, (K,): 1, or none."""
        return np.array([np.inf if name.partition("/")[0] in UNLIMITED else 1.0 for name in self.names])

    def fewest(self, patients: Sequence[str]) -> Array:
        """How many patients each metric's order rests on, (K,): those of the rarer class; no limit where none ranks.

        Below `MINIMUM` there is no interval, as at a site. The mean rests on as many as the rarest of its labels.

        Args:
            patients: N patient ids.
        """
        found = np.full(len(self.names), np.inf)
        if self.classes:
            of_label = np.minimum(*(patients_with(chosen, patients) for chosen in self.classes))  # (L,)
            known = of_label[of_label > 0]
            ranked = np.append(known.min() if len(known) else 0, of_label)
            found[1 : 1 + len(RANKING) * len(ranked)] = np.tile(ranked, len(RANKING))
        return found


def classification_intervals(
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    labels: Sequence[str],
    replicates: int,
    rng: np.random.Generator,
) -> dict[str, Interval]:
    """Returns every metric of `classification_metrics` with its interval, from the same resamples.

    As there, `<metric>` is the mean over the labels for which it is defined, in each replicate anew. A patient counts
    for a label if any of its images has a known target.

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
    check_patients(patients, len(logits))
    measures = classification_measures(logits, targets, labels)
    return _intervals(measures, patients, replicates, rng)


def classification_measures(
    logits: NDArray[np.floating], targets: NDArray[np.floating], labels: Sequence[str]
) -> Measures:
    """Returns the metrics behind `classification_intervals`, for logits and targets (N, L).

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    check_cases(logits, targets, unknown=True)
    check_labels(labels, logits.shape[1])
    known = ~np.isnan(targets)  # (N, L)
    target = np.where(known, targets, 0).astype(np.float64)
    declared = np.where(known, logits > 0, 0.0)
    right = np.where(known, declared == target, 0.0)
    loss = np.where(known, cross_entropy(logits.astype(np.float64), target), 0)
    brier = np.where(known, squared_errors(logits, target), 0)
    probability = np.where(known, probabilities(logits), 0)
    bins = calibration_bins(probability)[..., None] == np.arange(CALIBRATION_BINS)  # (N, L, 15)
    expected, observed = bins * probability[..., None], bins * target[..., None]  # of one image, by bin

    def statistic(weights: Array) -> Array:
        ranking = [ranking_metrics(logits[:, i], targets[:, i], weights) for i in range(len(labels))]
        area, average, sensitivity = np.reshape(ranking, (len(labels), 3, -1)).swapaxes(0, 1)  # each (L, R)
        count = known.T @ weights
        ece = [
            ece_of_sums(expected[:, i].T @ weights, observed[:, i].T @ weights, count[i]) for i in range(len(labels))
        ]
        return np.vstack(
            (
                quotient(loss.sum(axis=1) @ weights, known.sum(axis=1) @ weights),
                _under_mean(area),
                _under_mean(average),
                _under_mean(sensitivity),
                _under_mean(f1((declared * target).T @ weights, declared.T @ weights, target.T @ weights)),
                _under_mean(quotient(right.T @ weights, count)),
                _under_mean(quotient(brier.T @ weights, count)),
                _under_mean(np.reshape(ece, (len(labels), -1))),
            )
        )

    metrics = (*RANKING, "f1", "accuracy", "brier", "ece")
    counts = np.hstack((known.any(axis=1)[:, None], *[_under_any(known)] * len(metrics)))  # (N, K)
    classes = (targets == 1, targets == 0)
    return Measures(names=_names(metrics, labels), statistic=statistic, counts=counts, classes=classes)


def segmentation_intervals(
    cases: Cases, patients: Sequence[str], labels: Sequence[str], replicates: int, rng: np.random.Generator
) -> dict[str, Interval]:
    """Returns every metric of `segmentation_metrics` with its interval, from the same resamples.

    A patient counts for a distance of a label if it has a case of which neither mask is empty, for `lesion-sensitivity`
    if it has a lesion, and for everything else always.

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
    measures = segmentation_measures(cases, labels)
    return _intervals(measures, patients, replicates, rng)


def segmentation_measures(cases: Cases, labels: Sequence[str]) -> Measures:
    """Returns the metrics behind `segmentation_intervals`, for scores of N cases and L labels.

    Raises:
        DataError: If there is not one name for each label.
    """
    check_labels(labels, cases.total.shape[1])
    hd95, assd = np.nan_to_num(cases.hd95), np.nan_to_num(cases.assd)

    def statistic(weights: Array) -> Array:
        count = weights.sum(axis=0)  # (R,)
        intersection, total = cases.intersection.T @ weights, cases.total.T @ weights  # (L, R), (L, R)
        union, measured = total - intersection, cases.measured.T @ weights
        excluded = cases.excluded.T @ weights
        rows = np.vstack(
            (
                quotient(cases.loss @ weights, count),
                _under_mean(quotient(cases.dice.T @ weights, count)),
                _under_mean(quotient(cases.iou.T @ weights, count)),
                overlap(2 * intersection.sum(axis=0), total.sum(axis=0)),
                overlap(2 * intersection, total),
                overlap(intersection.sum(axis=0), union.sum(axis=0)),
                overlap(intersection, union),
                _under_mean(quotient(hd95.T @ weights, measured)),
                _under_mean(quotient(assd.T @ weights, measured)),
                excluded.sum(axis=0),
                excluded,
                _under_mean(quotient(cases.lesions_found.T @ weights, cases.lesions.T @ weights)),
                _under_mean(quotient(cases.lesions_invented.T @ weights, count)),
            )
        )
        return np.where(count > 0, rows, np.nan)

    everybody: NDArray[np.bool_] = np.ones(cases.dice.shape, dtype=np.bool_)
    counts: dict[str, NDArray[np.bool_]] = {
        **dict.fromkeys(("dice", "iou", "micro-dice", "micro-iou"), everybody),
        **dict.fromkeys(("hd95", "assd"), cases.measured),
        "hd95-excluded": everybody,
        "lesion-sensitivity": cases.lesions > 0,
        "lesion-false-positives": everybody,
    }
    counted = np.hstack((everybody[:, :1], *[_under_any(of_label) for of_label in counts.values()]))  # (N, K)
    return Measures(names=_names(tuple(counts), labels), statistic=statistic, counts=counted)


def _intervals(
    measures: Measures, patients: Sequence[str], replicates: int, rng: np.random.Generator
) -> dict[str, Interval]:
    counts, enough = patients_with(measures.counts, patients), measures.fewest(patients) >= MINIMUM
    return intervals(measures.names, measures.statistic, counts, enough, patients, replicates, rng)


def _names(metrics: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Returns `loss`, and each metric followed by itself for each label."""
    return ("loss", *(name for metric in metrics for name in (metric, *(f"{metric}/{label}" for label in labels))))


def _under_mean(values: Array) -> Array:
    """Returns the values (L, R) under their mean over the labels, NaN left out: (1 + L, R)."""
    defined = ~np.isnan(values)
    return np.vstack((quotient(np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0)), values))


def _under_any(counts: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns which images count for each label, (N, L), beside which count for any: (N, 1 + L)."""
    return np.hstack((counts.any(axis=1, keepdims=True), counts))
