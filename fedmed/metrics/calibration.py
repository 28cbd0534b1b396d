"""Whether probabilities mean what they say: Brier score and expected calibration error, as sums and as values.

Both are of one label and of its positive class, and may be weighted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from fedmed.metrics.ranking import Array

CALIBRATION_BINS = 15  # of equal width over the probability, as Guo et al. 2017 (arXiv:1706.04599)


def probabilities(logits: NDArray[np.floating]) -> Array:
    """Returns 1 / (1 + exp(-logit)) in float64."""
    values: Array = expit(logits.astype(np.float64))
    return values


def squared_errors(logits: NDArray[np.floating], targets: NDArray[np.floating]) -> Array:
    """Returns (p - target)² of each entry; its mean is the Brier score (Brier 1950, for one of two outcomes)."""
    errors: Array = np.square(probabilities(logits) - targets)
    return errors


def calibration_bins(probability: Array) -> NDArray[np.int64]:
    """Returns the bin, 0 to 14, of each probability: bin b holds b / 15 ≤ p < (b + 1) / 15, the last one also 1."""
    return np.minimum(probability * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(np.int64)


def calibration_sums(probability: Array, targets: NDArray[np.floating]) -> tuple[Array, Array]:
    """Returns by bin, (15,), the sum of the probabilities (N,) and the number of positives among the targets (N,)."""
    bins = calibration_bins(probability)
    expected = np.bincount(bins, weights=probability, minlength=CALIBRATION_BINS)
    observed = np.bincount(bins, weights=targets, minlength=CALIBRATION_BINS)
    return expected.astype(np.float64), observed.astype(np.float64)  # without entries numpy's are integers


def ece_of_sums(probability: Array, positives: Array, count: Array) -> Array:
    """Returns the expected calibration error: Σ_b n_b / N · |mean probability - share of positives|.

    Guo et al. 2017, arXiv:1706.04599, eq. 3, with the probability of the positive class in place of a confidence. n_b
    cancels: each bin adds |sum of probabilities - number of positives| / N.

    Args:
        probability: (15, …) sums of probabilities by bin.
        positives: (15, …) numbers of positives by bin.
        count: (…) N; the error is NaN where it is 0.
    """
    gap = np.abs(probability - positives).sum(axis=0)
    error: Array = np.divide(gap, count, out=np.full(gap.shape, np.nan), where=count > 0)
    return error
