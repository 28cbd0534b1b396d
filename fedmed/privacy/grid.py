"""Noise on a public grid, for numbers that leave in float64: below their noise nothing of the data is left.

Noise added in floating point leaves the last bits of a sum as they were wherever the noise is coarser, or lies on a
grid of its own (Mironov 2012, doi:10.1145/2382196.2382264). Here what a patient adds is rounded towards zero to a
multiple of the grid, which makes no vector longer, and the sum is one of whole numbers. So is the noise, a Gaussian
rounded to whole numbers: added to a whole number that is the same as rounding the sum of that number and the
Gaussian, hence no more than post-processing of the Gaussian mechanism, whatever the accountant.

What is approximated is the Gaussian, from 106 bits for its radius and 53 for its angle, in float64: a grid of 2⁻²⁶
standard deviations is 2²⁶ times as coarse, so each whole number has its chance to about one part in 10⁷.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedmed.privacy.noise import NoiseGenerator

FINENESS = 26  # the grid is at most 2⁻²⁶ standard deviations: what a million patients lose by it is under 2 % of one


def grid_of(deviation: float) -> float:
    """The grid of noise of a standard deviation: a power of two, so that multiples of it are exact."""
    return math.ldexp(1.0, math.frexp(deviation)[1] - 1 - FINENESS)


def whole(values: NDArray[np.float64], grid: float) -> NDArray[np.int64]:
    """Values as whole numbers of the grid, rounded towards zero."""
    return np.trunc(values / grid).astype(np.int64)


def noised(total: NDArray[np.int64], deviation: float, grid: float, source: NoiseGenerator) -> NDArray[np.float64]:
    """Sums of whole numbers of the grid with Gaussian noise, as multiples of the grid.

    Args:
        total: (values,), of the grid.
        deviation: standard deviation of the noise, in the values' own unit.
        grid: a power of two, no more than `grid_of(deviation)`.
        source: of the noise.
    """
    noise = np.rint(source.fine_normal(total.size) * (deviation / grid)).astype(np.int64)
    released: NDArray[np.float64] = (total + noise).astype(np.float64) * grid
    return released
