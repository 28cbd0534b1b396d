"""Segmentation with several labels: scores of each case, the sums that a site sends, and the metrics of the sums.

A case is one image. A pixel belongs to a label if its logit is above 0 (probability above ½). The Dice coefficient of
two empty masks is 1 by convention: finding nothing where nothing is, is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Scores of N cases and L labels. Small, whatever the size of the images; it never leaves a site."""

    loss: Array  # (N,) mean cross-entropy over pixels and labels
    intersection: Array  # (N, L) pixels |A ∩ B| of predicted mask A and true mask B
    total: Array  # (N, L) pixels |A| + |B|

    @property
    def dice(self) -> Array:
        """Returns 2 |A ∩ B| / (|A| + |B|) (Dice 1945) as (N, L); 1 where both masks are empty."""
        return overlap(2 * self.intersection, self.total)


def score_cases(logits: NDArray[np.floating], targets: NDArray[np.generic]) -> Cases:
    """Returns the scores of a batch; join batches with `join_cases`.

    Args:
        logits: (N, L, H, W), finite.
        targets: (N, L, H, W) masks of 0 and 1, of any type; NaN is no mask.

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a mask holds anything but 0 and 1.
    """
    check_cases(logits, targets, unknown=False)
    predicted, true = logits > 0, targets.astype(np.bool_)
    pixels = tuple(range(2, logits.ndim))
    loss = cross_entropy(logits.astype(np.float64), true.astype(np.float64))
    return Cases(
        loss=loss.reshape(len(loss), -1).mean(axis=1) if loss.size else np.zeros(len(loss)),
        intersection=(predicted & true).sum(axis=pixels).astype(np.float64),
        total=(predicted.sum(axis=pixels) + true.sum(axis=pixels)).astype(np.float64),
    )


def join_cases(batches: Sequence[Cases]) -> Cases:
    """Returns the cases of all batches, in order; at least one batch."""
    return Cases(**{f.name: np.concatenate([getattr(batch, f.name) for batch in batches]) for f in fields(Cases)})


def dice_per_case(logits: NDArray[np.floating], targets: NDArray[np.generic]) -> Array:
    """Returns the Dice coefficient of each case and label, (N, L), for logits and masks (N, L, H, W)."""
    return score_cases(logits, targets).dice


def segmentation_sums(
    logits: NDArray[np.floating], targets: NDArray[np.generic], patients: Sequence[str]
) -> dict[str, Array]:
    """Returns `case_sums` of a whole data set at once, from logits and masks (N, L, H, W) and N patient ids."""
    return case_sums(score_cases(logits, targets), patients)


def case_sums(cases: Cases, patients: Sequence[str]) -> dict[str, Array]:
    """Returns what a site contributes to the metrics; sums over sites equal the sums of the pooled cases.

    Returns:
        `loss` (1,), each case's mean over pixels and labels, summed over cases; `known` (1,) and `images` (1,), the
        number of cases; `patients` (1,), distinct ones; and for each label (L,): `dice` and `dice-square`, the sums of
        each case's coefficient and of its square; `cases`; `intersection` and `total`, in pixels.

    Raises:
        DataError: If there is not one patient for each case.
    """
    check_patients(patients, len(cases.loss))
    count = np.array([len(cases.loss)], dtype=np.float64)
    return {
        "loss": np.array([cases.loss.sum()]),
        "known": count,
        "dice": cases.dice.sum(axis=0),
        "dice-square": np.square(cases.dice).sum(axis=0),
        "cases": np.full(cases.dice.shape[1], count[0]),
        "intersection": cases.intersection.sum(axis=0),
        "total": cases.total.sum(axis=0),
        "patients": np.array([len(set(patients))], dtype=np.float64),
        "images": count.copy(),
    }


def segmentation_metrics(sums: Sums, labels: Sequence[str]) -> Metrics:
    """Returns the metrics of pooled sums.

    Args:
        sums: From `case_sums`, added over sites.
        labels: L names, in the order of the logits.

    Returns:
        `loss`; `dice/<label>`, the mean over cases, and `dice`, the mean over labels; `micro-dice/<label>`, the
        coefficient of all cases' pixels pooled, and `micro-dice`, of all labels' pixels too; `iou/<label>`, |A ∩ B| /
        (|A| + |B| - |A ∩ B|) of all cases' pixels pooled, and `iou`, the mean over labels. None where there is no case.

    Raises:
        DataError: If the sums are those of another number of labels.
    """
    check_labels(labels, len(sums["cases"]))
    judged = sums["cases"] > 0  # (L,)
    dice = [ratio(*pair) for pair in zip(sums["dice"], sums["cases"], strict=True)]
    micro = overlap(2 * sums["intersection"], sums["total"])
    iou = overlap(sums["intersection"], sums["total"] - sums["intersection"])
    pooled = overlap(2 * sums["intersection"].sum(), sums["total"].sum())
    by_label = {
        "dice": dice,
        "micro-dice": [float(value) if known else None for value, known in zip(micro, judged, strict=True)],
        "iou": [float(value) if known else None for value, known in zip(iou, judged, strict=True)],
    }
    metrics: Metrics = {"loss": ratio(sums["loss"][0], sums["known"][0])}
    for name, values in by_label.items():
        metrics[name] = mean_of_defined(values)
        metrics.update({f"{name}/{label}": value for label, value in zip(labels, values, strict=True)})
    return metrics | {"micro-dice": float(pooled) if judged.any() else None}


def overlap(numerator: Array, denominator: Array) -> Array:
    """Returns the quotient, element by element; 1 where the denominator is 0: both masks are empty."""
    return np.divide(numerator, denominator, out=np.ones(np.shape(denominator)), where=np.asarray(denominator) > 0)
