"""Percentile intervals by resampling patients (Efron and Tibshirani 1993, chapter 13; clusters: Field and Welsh 2007).

Images of one patient resemble each other, so the patient is what is drawn: a replicate draws as many patients as there
are, with replacement, and counts each image as often as its patient was drawn. Counts are weights, so a replicate is a
column of a weight matrix, and each statistic is computed for all columns at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.sums import Array

Statistic = Callable[[Array], Array]  # weights (N, R) of R replicates -> values (R,) or (K, R), NaN where undefined
CELLS = 2_000_000  # images times replicates in memory at once: 16 MB
LEVEL = 0.95  # of every interval


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A metric with its 95 % interval."""

    value: float | None  # on the data as they are; None if undefined
    low: float | None  # None if there is no interval
    high: float | None
    n: int  # patients that count for this metric


def bootstrap_patients(
    statistic: Statistic, patients: Sequence[str], replicates: int, rng: np.random.Generator
) -> tuple[float | None, float | None]:
    """Returns the 2.5 % and 97.5 % points of a statistic over resampled patients.

    Replicates in which the statistic is undefined are left out.

    Args:
        statistic: Maps weights (N, R), one column per replicate, to values (R,), NaN where undefined.
        patients: N patient ids, one per image.
        replicates: How many resamples; with 0 there is no interval.
        rng: Source of the resamples.

    Returns:
        (low, high), or (None, None) if fewer than half of the replicates are defined, or there are not two patients.
    """
    return _percentiles(replicate(statistic, patients, replicates, rng)[0], patients)


def intervals(
    names: Sequence[str],
    statistic: Statistic,
    counts: NDArray[np.bool_],
    patients: Sequence[str],
    replicates: int,
    rng: np.random.Generator,
) -> dict[str, Interval]:
    """Judges each of K metrics by the patients with an image that `counts` (N, K) for it."""
    values = statistic(np.ones((len(patients), 1)))[:, 0]  # (K,)
    drawn = replicate(statistic, patients, replicates, rng)  # (K, replicates)
    ids = np.asarray(patients)
    result = {}
    for k, name in enumerate(names):
        counted = ids[counts[:, k]]
        defined = not np.isnan(values[k])
        low, high = _percentiles(drawn[k], counted) if defined else (None, None)
        result[name] = Interval(
            value=float(values[k]) if defined else None, low=low, high=high, n=len(np.unique(counted))
        )
    return result


def replicate(statistic: Statistic, patients: Sequence[str], replicates: int, rng: np.random.Generator) -> Array:
    """Returns the statistic of each resample, (K, replicates); see `bootstrap_patients`."""
    distinct, patient = np.unique(np.asarray(patients), return_inverse=True)  # (P,), (N,)
    rows = [np.atleast_2d(statistic(np.ones((len(patient), 1))))[:, :0]]  # (K, 0): tells K without replicates too
    at_once = max(1, CELLS // max(1, len(patient)))
    for start in range(0, replicates if len(distinct) else 0, at_once):
        count = min(at_once, replicates - start)
        draws = rng.integers(len(distinct), size=(count, len(distinct)))  # (R, P) patients drawn
        cells = draws * count + np.arange(count)[:, None]
        times = np.bincount(cells.ravel(), minlength=len(distinct) * count).reshape(len(distinct), count)  # (P, R)
        rows.append(np.atleast_2d(statistic(times[patient].astype(np.float64))))
    return np.concatenate(rows, axis=1)


def _percentiles(values: Array, patients: Sequence[str] | NDArray[np.str_]) -> tuple[float | None, float | None]:
    """Returns (low, high) of replicates (R,), as `bootstrap_patients` defines them."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0 or 2 * len(defined) < len(values) or len(set(patients)) < 2:
        return None, None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
