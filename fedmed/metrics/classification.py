"""Classification with several labels: the sums that a site sends, and the metrics that the server computes from them.

A site sends no score of any patient: only, for each label, a histogram of the logits of its positives and one of those
of its negatives, and sums over its images. AUROC, average precision and sensitivity come from the histograms, with a
bound on what these hide (`classification_bounds`); the other metrics are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.calibration import CALIBRATION_BINS, calibration_sums, ece_of_sums, probabilities, squared_errors
from fedmed.metrics.histograms import (
    BINS,
    HistogramRanking,
    check_centres,
    ranking_of_histograms,
    score_histograms,
)
from fedmed.metrics.sums import (
    Array,
    Metrics,
    by_label,
    check_cases,
    check_labels,
    check_patients,
    cross_entropy,
    quotient,
    ratio,
)
from fedmed.types import Sums

SENSITIVITY = "sensitivity-at-90-specificity"  # ranking.SPECIFICITY


def classification_sums(
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    centres: Sequence[float] | None = None,
) -> dict[str, Array]:
    """Returns what a site contributes to the metrics; sums over sites equal the sums of the pooled images.

    Args:
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids. Only their number leaves this function.
        centres: L logits around which the bins of the histograms are finest, the same at every site; 0 if None.

    Returns:
        `loss` (1,), cross-entropy summed over known entries; `known` (1,), their number; `positives` and `negatives`
        (L * 4096,), histograms of the logits, label after label; for each label (L,) `true-positives` and
        `false-positives`, the entries of probability above ½ by class, and `brier`, their summed squared errors;
        `calibration-probability` and `calibration-positives` (L * 15,), label after label, by bin of the probability;
        `patients` (1,), distinct ones; `images` (1,).

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree, a target is none of 0, 1 and NaN, or a centre is outside of ±16.
    """
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    check_centres(centres, logits.shape[1])
    known = ~np.isnan(targets)
    positive, negative = targets == 1, targets == 0
    loss = cross_entropy(logits.astype(np.float64)[known], targets.astype(np.float64)[known])
    probability = probabilities(logits)
    calibration = [
        calibration_sums(probability[chosen, label], targets[chosen, label]) for label, chosen in enumerate(known.T)
    ]
    return {
        "loss": np.array([loss.sum()]),
        "known": np.array([known.sum()], dtype=np.float64),
        "positives": score_histograms(logits, positive, centres),
        "negatives": score_histograms(logits, negative, centres),
        "true-positives": (positive & (logits > 0)).sum(axis=0).astype(np.float64),
        "false-positives": (negative & (logits > 0)).sum(axis=0).astype(np.float64),
        "brier": np.where(known, squared_errors(logits, np.where(known, targets, 0)), 0).sum(axis=0),
        "calibration-probability": np.ravel([sums for sums, _ in calibration]),
        "calibration-positives": np.ravel([sums for _, sums in calibration]),
        "patients": np.array([len(set(patients))], dtype=np.float64),
        "images": np.array([len(logits)], dtype=np.float64),
    }


def classification_metrics(sums: Sums, labels: Sequence[str]) -> Metrics:
    """Returns the metrics of pooled sums.

    Args:
        sums: From `classification_sums`, added over sites.
        labels: L names, in the order of the logits.

    Returns:
        `loss`, the mean cross-entropy over known entries. Each of the following as `<metric>/<label>`, and as
        `<metric>`, its mean over the labels for which it is defined: `auroc`; `auprc`, the average precision;
        `sensitivity-at-90-specificity`, the largest one of a threshold whose specificity is at least 0.90; `f1` and
        `accuracy` at probability ½; `brier`; `ece` with 15 bins. None where undefined: the first three without both
        classes, `f1` without a positive, the last three without a known entry.

    Raises:
        DataError: If the sums are those of another number of labels.
    """
    value = _ranking(sums, labels).value
    positives, count = _counts(sums)  # (L,), (L,)
    declared = sums["true-positives"] + sums["false-positives"]
    true_negatives = count - positives - sums["false-positives"]
    calibration = [sums[f"calibration-{of}"].reshape(-1, CALIBRATION_BINS).T for of in ("probability", "positives")]
    return {
        "loss": ratio(sums["loss"][0], sums["known"][0]),
        **by_label("auroc", value.auroc, labels),
        **by_label("auprc", value.auprc, labels),
        **by_label(SENSITIVITY, value.sensitivity, labels),
        **by_label("f1", f1(sums["true-positives"], declared, positives), labels),
        **by_label("accuracy", quotient(sums["true-positives"] + true_negatives, count), labels),
        **by_label("brier", quotient(sums["brier"], count), labels),
        **by_label("ece", ece_of_sums(calibration[0], calibration[1], count), labels),
    }


def classification_bounds(sums: Sums, labels: Sequence[str]) -> Metrics:
    """Returns how far a metric of histograms can be from that of the scores, whatever these were.

    Args:
        sums: From `classification_sums`, added over sites.
        labels: L names, in the order of the logits.

    Returns:
        The bounds of `auroc`, `auprc` and `sensitivity-at-90-specificity`, named as in `classification_metrics`, None
        where the metric is undefined; the other metrics are exact. The bound of a mean is the mean of the bounds.

    Raises:
        DataError: If the sums are those of another number of labels.
    """
    bound = _ranking(sums, labels).bound
    return {
        **by_label("auroc", bound.auroc, labels),
        **by_label("auprc", bound.auprc, labels),
        **by_label(SENSITIVITY, bound.sensitivity, labels),
    }


def f1(true_positives: Array, declared: Array, positives: Array) -> Array:
    """Returns 2 TP / (declared + truly positive) (van Rijsbergen 1979, chapter 7); NaN where nothing is positive."""
    return quotient(np.where(positives > 0, 2 * true_positives, np.nan), declared + positives)


def _ranking(sums: Sums, labels: Sequence[str]) -> HistogramRanking:
    check_labels(labels, len(sums["positives"]) // BINS)
    return ranking_of_histograms(sums["positives"].reshape(-1, BINS), sums["negatives"].reshape(-1, BINS))


def _counts(sums: Sums) -> tuple[Array, Array]:
    """Returns the numbers of positives and of known entries of each label."""
    positives = sums["positives"].reshape(-1, BINS).sum(axis=1)
    return positives, positives + sums["negatives"].reshape(-1, BINS).sum(axis=1)
