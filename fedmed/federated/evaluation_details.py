"""`evaluation.json`: what the server's test patients show beyond single numbers, for the report.

The server's patients are its own, so cases may stand here one by one, and as pictures. The file stays at the server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics import GRID, Cases, Curve, LabelCurves, label_counts, label_curves, youden_threshold

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]  # logits and targets (N, L)
MOST_POINTS = 500  # of an exact curve; a page draws no more
HALF = 0.0  # logit of probability ½


def classification_details(
    scores: Pair, patients: Sequence[str], labels: Sequence[str], selection: Pair | None, *, replicates: int, seed: int
) -> dict[str, Any]:
    """Curves with bands, calibration, and the table at one threshold for each label.

    Args:
        scores: logits and targets of the test part.
        patients: N ids.
        labels: L names.
        selection: of the other part, on which the threshold is chosen: the one with the largest sensitivity +
            specificity - 1. Without it, or without both classes in it, the threshold is probability ½.
        replicates: of the bootstrap by patient behind the bands.
        seed: of the resamples.
    """
    logits, targets = scores
    chosen = [
        None if selection is None else youden_threshold(selection[0][:, k], selection[1][:, k])
        for k in range(len(labels))
    ]
    thresholds = [HALF if value is None else value for value in chosen]
    curves = label_curves(logits, targets, patients, thresholds, replicates, np.random.default_rng(seed))
    by_label = dict(zip(labels, curves, strict=True))
    return {
        "kind": "classification",
        "labels": list(labels),
        "patients": len(set(patients)),
        "images": len(logits),
        "counts": label_counts(targets, labels),
        "curves": {
            label: _curve_json(each.roc, "false_positive_rate", "true_positive_rate")
            for label, each in by_label.items()
        },
        "precision_recall": {
            label: _curve_json(each.precision_recall, "recall", "precision") for label, each in by_label.items()
        },
        "calibration": {label: _calibration_json(each) for label, each in by_label.items()},
        "thresholds": {
            label: _threshold_json(each, thresholds[k], chosen[k] is not None)
            for k, (label, each) in enumerate(by_label.items())
        },
    }


def segmentation_details(
    cases: Cases, patients: Sequence[str], labels: Sequence[str], pictures: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Dice and HD95 (mm) of every case, how many cases show each label, and pictures of the best and worst.

    Args:
        cases: scores of the test part.
        patients: one per case.
        labels: L names.
        pictures: from `Extremes.pictures`.
    """
    return {
        "kind": "segmentation",
        "labels": list(labels),
        "patients": len(set(patients)),
        "images": len(cases.loss),
        "counts": cases.label_counts(labels),
        "cases": {label: rounded(cases.dice[:, k]) for k, label in enumerate(labels)},
        "hd95": {label: rounded(cases.hd95[cases.measured[:, k], k]) for k, label in enumerate(labels)},
        "pictures": list(pictures),
    }


def rounded(values: NDArray[np.floating]) -> list[float | None]:
    """Four decimals, None for NaN."""
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def _curve_json(curve: Curve | None, x: str, y: str) -> dict[str, Any] | None:
    if curve is None:
        return None
    kept = np.unique(np.linspace(0, len(curve.x) - 1, min(len(curve.x), MOST_POINTS)).round().astype(np.int64))
    banded = curve.low is not None and curve.high is not None
    return {
        x: rounded(curve.x[kept]),
        y: rounded(curve.y[kept]),
        **({"at": rounded(GRID), "low": rounded(curve.low), "high": rounded(curve.high)} if banded else {}),  # type: ignore[arg-type]  # None is excluded by `banded`
    }


def _calibration_json(curves: LabelCurves) -> dict[str, Any]:
    found = curves.calibration
    values = {"probability": found.probability, "observed": found.observed, "low": found.low, "high": found.high}
    return {
        **{name: rounded(value) for name, value in values.items() if value is not None},
        "images": [int(count) for count in found.images],
    }


def _threshold_json(curves: LabelCurves, threshold: float, chosen: bool) -> dict[str, Any]:
    names = ("true_positives", "false_negatives", "false_positives", "true_negatives")
    return {
        "probability": round(1 / (1 + math.exp(-max(min(threshold, 700.0), -700.0))), 6),
        "chosen": chosen,
        **dict(zip(names, curves.confusion, strict=True)),
        "rates": {name: interval.to_json() for name, interval in curves.rates.items()},
    }
