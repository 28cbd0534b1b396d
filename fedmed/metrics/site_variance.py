"""What a site sends beside its histograms so that its AUROC has an interval: variances, and where they are given.

The server has no scores of a site to resample. The site has, and sends one number for each label and one for their
mean: the variance of its AUROC by patient (Obuchowski 1997, `clustered_auroc`). With fewer than `MINIMUM` patients with
a positive image, or with a negative one, it sends none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UpdateRefused
from fedmed.metrics.classification import classification_bounds, classification_metrics
from fedmed.metrics.histograms import BINS
from fedmed.metrics.obuchowski import MINIMUM, clustered_auroc, interval_of_variance
from fedmed.metrics.sums import Array
from fedmed.types import Sums

VARIANCE, GIVEN = "auroc-variance", "auroc-variance-given"
LARGEST = 0.25  # no quantity between 0 and 1 has a larger variance (Popoviciu 1935); an estimate is cut off there


def auroc_variances(
    logits: NDArray[np.floating], targets: NDArray[np.floating], patients: Sequence[str]
) -> dict[str, Array]:
    """Returns `auroc-variance` and `auroc-variance-given` (1 or 0), each (1 + L,): of the mean, and of each label.

    With θ̄ the mean over the K labels for which θ is defined,

        var θ̄ = (Σₖ var θₖ + Σ_{k≠l} I / (I - 1) Σᵢ uᵢₖ uᵢₗ) / K²,

    uᵢₖ the influence of patient i on θₖ and I the number of patients; with one label it is var θ. It is given if every
    defined label's is.

    Args:
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids, which never leave.

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    labels = logits.shape[1]
    variance, given = np.zeros(1 + labels), np.zeros(1 + labels)
    found = [clustered_auroc(logits[:, k], targets[:, k], patients) for k in range(labels)]
    enough = [min(one.positives, one.negatives) >= MINIMUM for one in found]
    for k, one in enumerate(found):
        if enough[k]:
            variance[1 + k], given[1 + k] = min(one.variance, LARGEST), 1
    defined = [k for k, one in enumerate(found) if not np.isnan(one.value)]
    if defined and all(enough[k] for k in defined):
        influence = np.stack([found[k].influence for k in defined])  # (K, P)
        cases = influence.shape[1]
        covariance = cases / (cases - 1) * influence @ influence.T  # (K, K)
        np.fill_diagonal(covariance, [found[k].variance for k in defined])
        variance[0], given[0] = np.clip(covariance.mean(), 0, LARGEST), 1
    return {VARIANCE: variance, GIVEN: given}


def parted_variances(sums: Sums) -> tuple[Sums, Sums]:
    """Returns the sums that add up over sites, and a site's variances, which are its own; either may be empty."""
    variances = {name: values for name, values in sums.items() if name in (VARIANCE, GIVEN)}
    return {name: values for name, values in sums.items() if name not in variances}, variances


def check_variances(variances: Sums, sums: Sums) -> None:
    """Refuses variances that no site can have computed from the cases that its histograms count.

    Args:
        variances: What one site sent beside its sums; none at all is allowed.
        sums: The site's sums, checked already.

    Raises:
        UpdateRefused: One of the two arrays is missing or of another shape, a number is out of its range, or a variance
            is given where the histograms hold fewer than `MINIMUM` images of a class.
    """
    if not variances:
        return
    images = np.stack([sums[name].reshape(-1, BINS).sum(axis=1) for name in ("positives", "negatives")])  # (2, L)
    shape = (1 + images.shape[1],)
    if variances.keys() != {VARIANCE, GIVEN} or any(values.shape != shape for values in variances.values()):
        raise UpdateRefused(f"the variances of the AUROC are incomplete or not of shape {shape}")
    variance, given = variances[VARIANCE], variances[GIVEN]
    if not (np.isin(given, (0, 1)).all() and (variance >= 0).all() and (variance <= LARGEST * given).all()):
        raise UpdateRefused(f"a variance of the AUROC is none between 0 and {LARGEST}")
    few = images.min(axis=0) < MINIMUM  # (L,)
    defined = images.min(axis=0) > 0
    if (given[1:] > ~few).any() or given[0] > (defined.any() and not (defined & few).any()):
        raise UpdateRefused(f"a variance of the AUROC is given for fewer than {MINIMUM} cases of a class")


def auroc_intervals(sums: Sums, labels: Sequence[str]) -> Mapping[str, tuple[float, float]]:
    """Returns the 95 % intervals of a site's `auroc` and `auroc/<label>` for which it sent a variance.

    On the logit scale, from the value minus its bound to the value plus it, so that what the histograms hide is in them
    too. An AUROC of 0 or 1 has none: all pairs are alike, and the sample does not tell what others would be.

    Args:
        sums: What one site sent, checked.
        labels: L names.
    """
    counts, variances = parted_variances(sums)
    if not variances:
        return {}
    values, bounds = classification_metrics(counts, labels), classification_bounds(counts, labels)
    found = {}
    for place, name in enumerate(("auroc", *(f"auroc/{label}" for label in labels))):
        value, bound, variance = values[name], bounds[name], float(variances[VARIANCE][place])
        if variances[GIVEN][place] and value is not None and bound is not None and 0 < value < 1:
            low, _ = interval_of_variance(max(value - bound, 0.0), variance)
            _, high = interval_of_variance(min(value + bound, 1.0), variance)
            found[name] = (low, high)
    return found
