"""Percentile intervals by resampling patients (Efron and Tibshirani 1993, chapter 13; clusters: Field and Welsh 2007).

Images of one patient resemble each other, so the patient is what is drawn: a replicate draws as many patients as there
are, with replacement, and counts each image as often as its patient was drawn. Counts are weights, so a replicate is a
column of a weight matrix, and each statistic is computed for all columns at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.obuchowski import MINIMUM
from fedmed.metrics.sums import Array

Statistic = Callable[[Array], Array]  # weights (N, R) of R replicates -> values (R,) or (K, R), NaN where undefined
CELLS = 1_000_000  # images times replicates in memory at once: 8 MB
LEVEL = 0.95  # of every interval


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A metric with its 95 % interval."""

    value: float | None  # on the data as they are; None if undefined
    low: float | None  # None if there is no interval
    high: float | None
    n: int  # patients that count for this metric

    def to_json(self) -> dict[str, float | int | None]:
        """As it stands in `result.json` and in the other files of a run: null for what is not finite."""
        return {"value": finite(self.value), "low": finite(self.low), "high": finite(self.high), "n": self.n}


def finite(value: float | None) -> float | None:
    """A number as JSON may hold it: None for NaN and infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def intervals(
    names: Sequence[str],
    statistic: Statistic,
    counts: NDArray[np.int64],
    enough: NDArray[np.bool_],
    patients: Sequence[str],
    replicates: int,
    rng: np.random.Generator,
) -> dict[str, Interval]:
    """Judges each of K metrics by `counts` (K,) patients; no interval below `MINIMUM`, or where not `enough` (K,)."""
    values = statistic(np.ones((len(patients), 1)))[:, 0]  # (K,)
    drawn = replicate(statistic, patients, replicates, rng)  # (K, replicates)
    result = {}
    for k, name in enumerate(names):
        n, defined = int(counts[k]), not np.isnan(values[k])
        low, high = interval_ends(drawn[k], enough=bool(defined and enough[k] and n >= MINIMUM))
        result[name] = Interval(value=float(values[k]) if defined else None, low=low, high=high, n=n)
    return result


def patients_with(chosen: NDArray[np.bool_], patients: Sequence[str]) -> NDArray[np.int64]:
    """Returns how many patients have an image that is chosen, for each column of (N, K)."""
    distinct, patient = np.unique(np.asarray(patients), return_inverse=True)  # (P,), (N,)
    times = np.zeros((len(distinct), chosen.shape[1]), np.int64)
    np.add.at(times, patient, chosen)
    found: NDArray[np.int64] = np.count_nonzero(times, axis=0)
    return found


def replicate(
    statistic: Statistic,
    patients: Sequence[str],
    replicates: int,
    rng: np.random.Generator,
    *,
    among: Sequence[str] = (),
) -> Array:
    """Returns the statistic of each resample, (K, replicates).

    The draws depend on the patients and the generator alone, so that two networks that are judged on the same patients
    with equal generators are judged on the same resamples, and their replicates can be compared in pairs.

    Args:
        statistic: Maps weights (N, R), one column per replicate, to values (R,) or (K, R), NaN where undefined.
        patients: N patient ids, one per image.
        replicates: How many resamples.
        rng: Source of the resamples.
        among: The patients that are drawn from, if they are more than those of the images: where several networks were
            judged on different parts of the same patients.
    """
    rows = [np.atleast_2d(statistic(np.ones((len(patients), 1))))[:, :0]]  # (K, 0): tells K without replicates too
    rows += [np.atleast_2d(statistic(weights)) for weights in _weights(patients, among or patients, replicates, rng)]
    return np.concatenate(rows, axis=1)


def percentiles(drawn: Array) -> tuple[float | None, float | None]:
    """Returns the 2.5 % and 97.5 % points of replicates (R,); (None, None) if fewer than half of them are defined."""
    defined = drawn[~np.isnan(drawn)]
    if len(defined) == 0 or 2 * len(defined) < len(drawn):
        return None, None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval_ends(drawn: Array, *, enough: bool) -> tuple[float | None, float | None]:
    """Returns the interval that replicates (R,) bear.

    Args:
        drawn: NaN where undefined.
        enough: Whether there are enough patients. Few are drawn again and again, and show nothing of what others would.

    Returns:
        (low, high), or (None, None) if there are not enough patients, if fewer than half of the replicates are defined,
        or if all are alike, as those of an AUROC of 1 are: they say nothing of what other patients would show.
    """
    low, high = percentiles(drawn) if enough else (None, None)
    return (None, None) if low == high else (low, high)


def _weights(
    patients: Sequence[str], among: Sequence[str], replicates: int, rng: np.random.Generator
) -> Iterator[Array]:
    """Yields how often each image is drawn, (N, R) for some replicates at a time."""
    distinct = np.unique(np.asarray(among))  # (P,)
    patient = np.searchsorted(distinct, np.asarray(patients))  # (N,)
    at_once = max(1, CELLS // max(1, len(patient)))
    for start in range(0, replicates if len(distinct) else 0, at_once):
        count = min(at_once, replicates - start)
        draws = rng.integers(len(distinct), size=(count, len(distinct)))  # (R, P) patients drawn
        cells = draws * count + np.arange(count)[:, None]
        times = np.bincount(cells.ravel(), minlength=len(distinct) * count).reshape(len(distinct), count)  # (P, R)
        yield times[patient].astype(np.float64)
