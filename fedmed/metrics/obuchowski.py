"""The variance of an AUROC whose images are clustered by patient, in closed form: for sites that resample nothing.

Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data", Biometrics 53(2), 567-578: the placement values
of DeLong et al. 1988, summed within each patient, because a patient is what varies from sample to sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.sums import Array, check_cases, check_patients

MINIMUM = 10  # patients behind any interval; positive ones, and negative ones, behind an AUROC's
QUANTILE = 1.959963984540054  # of the normal distribution at 0.975, for intervals of 95 %


@dataclass(frozen=True, kw_only=True)
class ClusteredAuroc:
    """The AUROC of one label and what every patient contributes to its error."""

    value: float  # NaN without both classes
    variance: float  # NaN without two patients of each class
    influence: Array  # (P,) of each patient; sums to 0
    positives: int  # patients with a positive image
    negatives: int  # patients with a negative image


def clustered_auroc(
    scores: NDArray[np.floating], targets: NDArray[np.floating], patients: Sequence[str]
) -> ClusteredAuroc:
    """Returns the AUROC θ of one label with Obuchowski's variance.

    With V₁₀ of a positive the share of all N negatives that it beats, and V₀₁ of a negative the share of all M
    positives that beat it (ties count ½), let a patient's aᵢ = Σ (V₁₀ - θ) over its mᵢ positives and bᵢ = Σ (V₀₁ - θ)
    over its nᵢ negatives. Then (eq. 4)

        var θ = S₁₀ / M + S₀₁ / N + 2 S₁₁ / (M N),
        S₁₀ = I₁₀ / ((I₁₀ - 1) M) Σ aᵢ²,  S₀₁ = I₀₁ / ((I₀₁ - 1) N) Σ bᵢ²,  S₁₁ = I / (I - 1) Σ aᵢ bᵢ,

    I₁₀ and I₀₁ the patients with a positive and a negative image, I all of them.

    Args:
        scores: (N,), higher means positive.
        targets: (N,) 0, 1 or NaN where unknown.
        patients: N patient ids.

    Raises:
        ModelError: If a score is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    check_cases(scores[:, None], targets[:, None], unknown=True)
    check_patients(patients, len(scores))
    names, patient = np.unique(np.asarray(patients), return_inverse=True)  # (P,), (N,)
    positive, negative = targets == 1, targets == 0
    beats, beaten = _placements(scores[positive], scores[negative])
    m, n = len(beats), len(beaten)
    with_positive, with_negative = (len(set(patient[which])) for which in (positive, negative))
    if m == 0 or n == 0:
        nothing = np.full(len(names), np.nan)
        return ClusteredAuroc(
            value=np.nan, variance=np.nan, influence=nothing, positives=with_positive, negatives=with_negative
        )
    value = float(beats.mean())
    a = np.bincount(patient[positive], weights=beats - value, minlength=len(names))  # (P,)
    b = np.bincount(patient[negative], weights=beaten - value, minlength=len(names))  # (P,)
    variance = np.nan
    if with_positive > 1 and with_negative > 1:
        s10 = with_positive / ((with_positive - 1) * m) * (a @ a)
        s01 = with_negative / ((with_negative - 1) * n) * (b @ b)
        judged = len(set(patient[positive | negative]))
        s11 = judged / (judged - 1) * (a @ b)
        variance = max(float(s10 / m + s01 / n + 2 * s11 / (m * n)), 0.0)
    return ClusteredAuroc(
        value=value, variance=variance, influence=a / m + b / n, positives=with_positive, negatives=with_negative
    )


def interval_of_variance(value: float, variance: float) -> tuple[float, float]:
    """Returns the 95 % interval of an AUROC from its variance, on the logit scale, on which it stays within 0 and 1.

    logit θ ± z √(var θ) / (θ (1 - θ)) (Pepe 2003, section 5.2.4). At 0 and at 1, where that has no value, the interval
    is the point: all pairs are alike, and the sample says nothing of the others.
    """
    spread = value * (1 - value)
    if spread == 0:
        return value, value
    middle, half = np.log(value / (1 - value)), QUANTILE * np.sqrt(variance) / spread
    low, high = 1 / (1 + np.exp(-(middle - half))), 1 / (1 + np.exp(-(middle + half)))
    return float(low), float(high)


def _placements(positives: NDArray[np.floating], negatives: NDArray[np.floating]) -> tuple[Array, Array]:
    """Returns the share of negatives that each positive beats, and of positives that beat each negative; ties are ½."""
    above, below = np.sort(positives), np.sort(negatives)
    wins = np.searchsorted(below, positives, "left") + np.searchsorted(below, positives, "right")
    losses = np.searchsorted(above, negatives, "left") + np.searchsorted(above, negatives, "right")
    return wins / (2 * max(len(below), 1)), 1 - losses / (2 * max(len(above), 1))
