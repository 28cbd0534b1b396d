"""Scores of each segmented case: overlap, distances of surfaces, lesions.

A case is one image, slice or volume. A voxel, or pixel, belongs to a label if its logit is above 0 (probability above
½). Of labels that exclude each other, one logit at most must be above 0 when it comes here (`training.evaluate`).
The Dice coefficient and the IoU of two empty masks are 1 by convention: finding nothing where nothing is, is right.
Surfaces have a distance only where both masks hold something. A case in which both are empty counts for no distance;
one in which exactly one is empty neither, and is counted as excluded: its distance would be infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed.errors import DataError
from fedmed.metrics.lesions import lesion_counts
from fedmed.metrics.sums import Array, LabelCounts, check_cases, cross_entropy, label_counts
from fedmed.metrics.surfaces import surface_scores


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Scores of N cases and L labels. Small, whatever the size of the images; it never leaves a site."""

    loss: Array  # (N,) mean binary cross-entropy over voxels and labels
    intersection: Array  # (N, L) voxels |A ∩ B| of predicted mask A and true mask B
    predicted: Array  # (N, L) voxels |A|
    true: Array  # (N, L) voxels |B|
    hd95: Array  # (N, L) mm, NaN where undefined or not asked for
    assd: Array  # (N, L) mm, NaN where undefined or not asked for
    lesions: Array  # (N, L) true ones
    lesions_found: Array  # (N, L)
    lesions_invented: Array  # (N, L)

    @property
    def total(self) -> Array:
        """Returns |A| + |B| as (N, L)."""
        return self.predicted + self.true

    @property
    def union(self) -> Array:
        """Returns |A ∪ B| as (N, L)."""
        return self.total - self.intersection

    @property
    def dice(self) -> Array:
        """Returns 2 |A ∩ B| / (|A| + |B|) (Dice 1945) as (N, L); 1 where both masks are empty."""
        return overlap(2 * self.intersection, self.total)

    @property
    def iou(self) -> Array:
        """Returns |A ∩ B| / |A ∪ B| (Jaccard 1912) as (N, L); 1 where both masks are empty."""
        return overlap(self.intersection, self.union)

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Returns where surfaces have a distance, (N, L): where both masks hold something, if distances were asked."""
        return ~np.isnan(self.hd95)

    def label_counts(self, labels: Sequence[str]) -> LabelCounts:
        """Returns in how many cases each of the L labels is there, and in how many it is not."""
        return label_counts((self.true > 0).astype(np.float64), labels)

    @property
    def excluded(self) -> NDArray[np.bool_]:
        """Returns where exactly one of the two masks is empty, (N, L)."""
        one: NDArray[np.bool_] = (self.predicted > 0) != (self.true > 0)
        return one


def score_cases(
    logits: NDArray[np.floating], targets: NDArray[np.generic], spacing_mm: ArrayLike = 1.0, *, distances: bool = True
) -> Cases:
    """Returns the scores of a batch; join batches with `join_cases`.

    Args:
        logits: (N, L, H, W) or (N, L, D, H, W), finite.
        targets: Masks of 0 and 1 of the same shape, of any type; NaN is no mask.
        spacing_mm: Distance of neighbouring voxels: one number, one for each of the axes ([D,] H, W), or (N, axes) for
            each case its own. With the default, distances are in voxels.
        distances: Whether to compute `hd95` and `assd`, which cost more than all others.

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree, a mask holds anything but 0 and 1, or the spacing is of another shape or not
            positive.
    """
    check_cases(logits, targets, unknown=False)
    spacing = _spacing(spacing_mm, len(logits), logits.ndim - 2)  # (N, axes)
    predicted, true = logits > 0, targets.astype(np.bool_)
    voxels = tuple(range(2, logits.ndim))
    loss = cross_entropy(logits.astype(np.float64), true.astype(np.float64))
    surfaces = np.full((*logits.shape[:2], 2), np.nan)
    lesions = np.zeros((*logits.shape[:2], 3))
    for case, label in np.ndindex(*logits.shape[:2]):
        masks = predicted[case, label], true[case, label]
        lesions[case, label] = lesion_counts(*masks)
        if distances:
            surfaces[case, label] = surface_scores(*masks, spacing[case])
    return Cases(
        loss=loss.reshape(len(loss), -1).mean(axis=1) if loss.size else np.zeros(len(loss)),
        intersection=(predicted & true).sum(axis=voxels).astype(np.float64),
        predicted=predicted.sum(axis=voxels).astype(np.float64),
        true=true.sum(axis=voxels).astype(np.float64),
        hd95=surfaces[..., 0],
        assd=surfaces[..., 1],
        lesions=lesions[..., 0],
        lesions_found=lesions[..., 1],
        lesions_invented=lesions[..., 2],
    )


def join_cases(batches: Sequence[Cases]) -> Cases:
    """Returns the cases of all batches, in order; at least one batch."""
    return Cases(**{f.name: np.concatenate([getattr(batch, f.name) for batch in batches]) for f in fields(Cases)})


def overlap(numerator: Array, denominator: Array) -> Array:
    """Returns the quotient, element by element; 1 where the denominator is 0: both masks are empty."""
    return np.divide(numerator, denominator, out=np.ones(np.shape(denominator)), where=np.asarray(denominator) > 0)


def _spacing(spacing_mm: ArrayLike, cases: int, axes: int) -> Array:
    """Returns the spacing of each case along each axis, (N, axes)."""
    given = np.asarray(spacing_mm, dtype=np.float64)
    if given.shape not in ((), (axes,), (cases, axes)):
        raise DataError(f"spacing of shape {given.shape}; expected one number, {axes} for the axes, or those by case")
    if not ((given > 0) & np.isfinite(given)).all():
        raise DataError("the spacing of voxels must be positive and finite")
    return np.broadcast_to(given, (cases, axes))
