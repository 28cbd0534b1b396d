"""Rényi divergences of one step of the Poisson-sampled Gaussian mechanism, for a patient with one image or several.

With k images, each drawn with probability q and clipped to 1, a patient moves the sum by J ~ Binomial(k, q) at most.
The step is then a mixture of Gaussians: P = Σ_j Pr[J = j]·N(j, σ²) with the patient, and Q = N(0, σ²) without (Ganesh
2024, arXiv:2401.10294: this pair dominates). That is group privacy computed, not bounded by k times the shift; k = 1 is
the mechanism of Mironov et al. 2019 (arXiv:1908.10530). Their series for fractional orders, as dp-accounting sums it,
loses digits and sometimes gives up, so the two integrals are taken directly; at whole orders the results are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(float(order) for order in (*range(11, 64), 72, 80, 96, 128, 160, 192, 256, 384, 512, 1024)),
)
TAILS = 13.0  # standard deviations that the integrals reach beyond their outermost peaks: what is left out is 1e-38
MOST_VALUES = 2**21  # of the integrand at one order: above, the order is left out, which only loosens the bound
ROUNDING = 2e-14  # of the sums; added, so that a divergence is never too small


@lru_cache(maxsize=1024)
def step_curve(orders: Sequence[float], sigma: float, rate: float, images: int) -> Values:
    """max(D_α(P‖Q), D_α(Q‖P)) of one step, by the trapezoid rule on a grid finer than anything in the integrand.

    Args:
        orders: α > 1, as a tuple.
        sigma: noise multiplier σ > 0, for one image.
        rate: q of the Poisson sampling of images, 0 < q < 1.
        images: k, of one patient in the whole run; 1 where the patient is what is sampled and clipped.

    Returns:
        Rényi divergences, (orders,); infinite at an order that would need too large a grid.
    """
    step = min(
        sigma / 4, sigma**2 / (2 * images)
    )  # P has complex zeros at a distance of about πσ²/k from the real line
    curve = np.array([_divergence(order, sigma, rate, images, step) for order in orders])
    curve.setflags(write=False)
    return curve


def _divergence(order: float, sigma: float, rate: float, images: int, step: float) -> float:
    reach = order * images + TAILS * sigma
    if 2 * reach / step * (images + 1) > MOST_VALUES:
        return math.inf
    x = np.arange(-reach, reach + step, step)  # (points,)
    drawn = np.arange(images + 1)[:, None]  # (k + 1, 1)
    ways = np.array([math.lgamma(images + 1) - math.lgamma(j + 1) - math.lgamma(images - j + 1) for j in drawn[:, 0]])
    weights = ways[:, None] + drawn * math.log(rate) + (images - drawn) * math.log1p(-rate)
    ratio = _log_sum(weights + (drawn * x - drawn**2 / 2) / sigma**2)  # ln P/Q, (points,)
    base = -((x / sigma) ** 2) / 2 + math.log(step / (sigma * math.sqrt(2 * math.pi)))  # ln Q, times the step
    with_patient = _log_sum((base + order * ratio)[:, None])[0]
    without = _log_sum((base + (1 - order) * ratio)[:, None])[0]
    return (max(float(with_patient), float(without), 0.0) + ROUNDING) / (order - 1)


def _log_sum(logs: Values) -> Values:
    """Ln Σ exp over the first axis."""
    largest = logs.max(axis=0)
    total: Values = largest + np.log(np.exp(logs - largest).sum(axis=0))
    return total
