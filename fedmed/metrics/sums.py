"""What all metrics share: adding the sites' sums, the cross-entropy, ratios that may be undefined, their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError, ModelError, UpdateRefused
from fedmed.types import Sums

Array = NDArray[np.float64]
Metrics = dict[str, float | None]
LabelCounts = dict[str, dict[str, int]]  # by label, how many are "positives" and how many "negatives"
LARGEST = 1e60  # of a sum: above what any site can add up, and its powers are finite
COUNTS = {  # whole numbers, so that what is divided by is 0 or at least 1
    "known", "patients", "images", "positives", "negatives", "true-positives", "false-positives",
    "calibration-positives", "cases", "intersection", "total", "measured", "excluded", "lesions", "lesions-found",
    "lesions-invented",
}  # fmt: skip


def add_sums(sites: Iterable[Sums]) -> dict[str, Array]:
    """Returns the sums over all sites, name by name, in the order given; without sites an empty dict. Changes none.

    The first sums tell which names and shapes are expected. A server that trusts no site begins with the sums of no
    images, `classification_sums(empty, empty, [])`.

    Raises:
        UpdateRefused: If names or shapes differ from the first ones, or an entry is negative, NaN or too large, or a
            count is no whole number.
    """
    totals: dict[str, Array] = {}
    for number, sums in enumerate(sites):
        if number and sums.keys() != totals.keys():
            raise UpdateRefused(f"metrics hold {sorted(sums)}; expected {sorted(totals)}")
        for name, values in sums.items():
            if number and values.shape != totals[name].shape:
                raise UpdateRefused(f"metric sum {name!r} has shape {values.shape}; expected {totals[name].shape}")
            if not ((values >= 0) & (values < LARGEST)).all():
                raise UpdateRefused(f"metric sum {name!r} holds a negative, non-finite or impossibly large number")
            if name in COUNTS and not (values == np.floor(values)).all():
                raise UpdateRefused(f"metric sum {name!r} counts something, and holds no whole number")
            totals[name] = totals[name] + values if number else np.array(values, dtype=np.float64)
    return totals


def label_counts(targets: NDArray[np.floating], labels: Sequence[str]) -> LabelCounts:
    """Returns how many targets (N, L) of each of the L labels are 1 and how many 0; NaN, unknown, is neither."""
    return {
        label: {"positives": int((targets[:, k] == 1).sum()), "negatives": int((targets[:, k] == 0).sum())}
        for k, label in enumerate(labels)
    }


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Returns -log p where the target is 1 and -log(1 - p) where it is 0, with p = 1 / (1 + exp(-logit))."""
    loss: Array = np.maximum(logits, 0) - logits * targets + np.log1p(np.exp(-np.abs(logits)))
    return loss


def ratio(numerator: float | np.floating, denominator: float | np.floating) -> float | None:
    """Returns the quotient, or None where the denominator is zero."""
    return float(numerator) / float(denominator) if denominator else None


def quotient(numerator: Array, denominator: Array) -> Array:
    """Returns the quotient, element by element and broadcast, NaN where the denominator is 0."""
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    full = np.broadcast_to(denominator, shape)
    result: Array = np.divide(numerator, full, out=np.full(shape, np.nan), where=full > 0)
    return result


def by_label(name: str, values: Array, labels: Sequence[str], *, add: bool = False) -> Metrics:
    """Returns the L values as `<name>/<label>`, after their mean over the labels as `<name>`; None stands for NaN.

    Args:
        name: Of the metric.
        values: (L,), NaN where undefined; the mean leaves these out.
        labels: L names.
        add: Whether `<name>` is the sum over the labels, for counts.
    """
    defined = values[~np.isnan(values)]
    overall = defined.sum() if add else defined.mean() if len(defined) else np.nan
    pairs = zip((name, *(f"{name}/{label}" for label in labels)), (overall, *values), strict=True)
    return {key: None if np.isnan(value) or not len(defined) else float(value) for key, value in pairs}


def check_cases(logits: NDArray[np.floating], targets: NDArray[np.generic], *, unknown: bool) -> None:
    """Refuses cases that no metric can judge.

    Args:
        logits: (N, L, …).
        targets: Of the same shape.
        unknown: Whether a target may be NaN, for "unknown".

    Raises:
        ModelError: If a logit is NaN or infinite: the network has diverged.
        DataError: If shapes disagree, or a target is neither 0 nor 1.
    """
    if logits.shape != targets.shape or logits.ndim < 2:
        raise DataError(f"logits {logits.shape} and targets {targets.shape}; expected the same (images, labels, ...)")
    if not np.isfinite(logits).all():
        raise ModelError("the network returned NaN or infinite logits: it has diverged; lower train.learning-rate")
    allowed = (targets == 0) | (targets == 1)
    if unknown:
        allowed |= np.isnan(targets.astype(np.float64))
    if not allowed.all():
        raise DataError(f"targets must be 0 or 1{' or NaN, for unknown' if unknown else ''}")


def check_patients(patients: Sequence[str], images: int) -> None:
    """Refuses a number of patient ids other than the number of images with a DataError."""
    if len(patients) != images:
        raise DataError(f"{len(patients)} patient ids for {images} images; expected one for each")


def check_labels(labels: Sequence[str], expected: int) -> None:
    """Refuses a number of label names other than the number of labels judged with a DataError."""
    if len(labels) != expected:
        raise DataError(f"{len(labels)} label names for {expected} labels; expected one for each")
