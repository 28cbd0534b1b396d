"""Which of two networks is better: paired differences over resampled patients, and over seeds where there are several.

Networks that are compared are judged on the same patients and on the same resamples of them (`resampling.replicate`
with equal generators), so that what makes a patient easy or hard for both cancels. The spread between trainings counts
where there are several seeds. Seeds are few, and drawing S of S with replacement would understate their variance by
(S - 1) / S and give quantiles of a normal distribution (Hesterberg 2015, The American Statistician 69(4)). So a
replicate resamples the patients, and moves the mean over the seeds by its standard error times a draw of Student's t.
A training that suits some patients more than others counts in both parts, which makes an interval wider, not narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmed.metrics.resampling import interval_ends
from fedmed.metrics.sums import Array

ENOUGH_SEEDS = 5  # to compare algorithms: fewer say too little about the spread between trainings


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much larger the metric of one network is than that of another, with its 95 % interval."""

    value: float | None  # None if undefined
    low: float | None  # None if there is no interval, and then no p either
    high: float | None
    p: float | None  # two-sided; None if undefined or not to be computed


def seed_moves(seeds: int, replicates: int, rng: np.random.Generator) -> Array:
    """Returns by which shares of the values of S seeds each replicate moves their mean, (replicates, S); rows sum to 0.

    For values x, Σₛ moveₛ xₛ has the distribution of s / √S · t, where s is their standard deviation and t is Student's
    with S - 1 degrees of freedom. It is linear in x, so a difference of two networks moves by its own. A single seed
    says nothing of others and moves nothing.
    """
    if seeds == 1:
        return np.zeros((replicates, 1))
    normal = rng.standard_normal((replicates, seeds))
    spread = np.sqrt(rng.chisquare(seeds - 1, (replicates, 1)) * seeds)
    moves: Array = (normal - normal.mean(axis=1, keepdims=True)) / spread
    return moves


def over_seeds(values: Array, drawn: Array, moves: Array) -> Array:
    """Returns replicates (R,) of the mean over S seeds.

    Args:
        values: (S,), the metric of each seed's network on the patients as they are.
        drawn: (S, R), the same on each resample of the patients.
        moves: (R, S), from `seed_moves`; the same for all that is compared.
    """
    replicates: Array = drawn.mean(axis=0) + moves @ values
    return replicates


def paired_difference(
    values: tuple[float, float], drawn: tuple[Array, Array], *, test: bool = True, enough: bool = True
) -> Difference:
    """Returns the first minus the second, with an interval and a p-value from replicates in pairs.

    Args:
        values: On the data as they are; NaN where undefined.
        drawn: Replicates (R,) of the first and the second, from the same draws.
        test: Whether to give a p-value.
        enough: Whether there are enough patients for an interval and a p-value.
    """
    value, replicates = values[0] - values[1], drawn[0] - drawn[1]
    if np.isnan(value):
        return Difference(value=None, low=None, high=None, p=None)
    low, high = interval_ends(replicates, enough=enough)
    p = p_value(replicates) if test and low is not None else None
    return Difference(value=float(value), low=low, high=high, p=p)


def p_value(differences: Array) -> float:
    """Returns the level at which the percentile interval of the replicates (R,) would begin to hold 0.

    p = 2 min(1 + #{d ≤ 0}, 1 + #{d ≥ 0}) / (R + 1), at most 1 (Davison and Hinkley 1997, section 4.2.5 and eq. 4.11):
    two-sided, and never 0, because R resamples cannot show that. Undefined replicates are left out.
    """
    defined = differences[~np.isnan(differences)]
    below, above = np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0)
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(defined))))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns the p-values of a family of tests, adjusted after Holm (1979): step-down, for any dependence.

    The k-th smallest of m becomes the largest of (m + 1 - j) pⱼ over j ≤ k, at most 1. None is no test and stays None.
    """
    tests = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[place] = largest
    return adjusted
