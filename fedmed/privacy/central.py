"""Differential privacy at the server, with the hospital as the unit: clip, sum, divide by a fixed count, add noise.

It trusts the server, which sees every hospital's change before the noise. Neighbours are two federations that differ in
one hospital, all its patients included; a hospital that does not answer adds zero. Only trained parameters leave: a
buffer such as a running mean has no bounded share, so buffers stay the server's.

Sources: McMahan et al. 2018 (arXiv:1710.06963), algorithm 1, with its fixed-denominator estimator; Andrew et al. 2021
(arXiv:1905.03871) for clipping that adapts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.config import LEAST_CLIP, MOST_CLIP
from fedmed.errors import ConfigError, UpdateRefused
from fedmed.privacy.grid import grid_of, noised
from fedmed.privacy.noise import NoiseGenerator
from fedmed.types import FloatVector, PrivacyEvent

CHUNK = 65_536  # values; a chunk in float64 stays in a core's cache
FASTEST = 100.0  # e-folds: a clip moves no farther at once, which is more than its whole range
COUNT_SHARE = 0.05  # of a release's precision 1/σ², what the count of unclipped changes gets where the clip adapts
ROUNDING = 1 - 2.0**-22  # float32 products round up by at most 2⁻²⁴ each; so the clipped norm never passes the clip


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """One hospital's change, no longer than the clip."""

    change: FloatVector  # (parameters,)
    norm_before: float
    scale: float  # what the change was multiplied by, 1 where it was short enough

    @property
    def unclipped(self) -> bool:
        """Whether the change came through as it was."""
        return self.scale == 1.0


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """How the clip follows a quantile of the changes' norms (Andrew et al. 2021, algorithm 1)."""

    quantile: float = 0.5  # γ: the share of changes that should come through unclipped
    rate: float = 0.2  # η: how fast the clip moves, geometrically
    count_noise: float = 1.0  # σ_b: standard deviation of the noise on the count of unclipped changes

    def __post_init__(self) -> None:
        if not (0 < self.quantile < 1 and self.rate > 0 and self.count_noise > 0):
            raise ConfigError("adaptive clipping needs a quantile between 0 and 1, and a rate and a noise above 0")


def clip_change(change: FloatVector, clip: float) -> Clipped:
    """Change · min(1, clip / ‖change‖); a zero change stays zero.

    Args:
        change: trained parameters after minus before, (parameters,).
        clip: the largest L2 norm that a hospital may add, C.

    Returns:
        A change whose exact norm is at most `clip`, and facts that may not leave the server un-noised.

    Raises:
        UpdateRefused: a value is not finite. Infinity has no direction, and NaN would pass any comparison.
        ConfigError: the clip is not a positive number.
    """
    _check_clip(clip)
    norm = math.sqrt(sum(_squares(change[start : start + CHUNK]) for start in range(0, change.size, CHUNK)))
    if not math.isfinite(norm):
        raise UpdateRefused("the update's parameters are not finite")
    if norm <= clip:
        return Clipped(change=change, norm_before=norm, scale=1.0)
    scale = clip / norm * ROUNDING
    return Clipped(change=change * np.float32(scale), norm_before=norm, scale=scale)


def noised_mean(
    clipped_sum: NDArray[np.floating],
    *,
    clip: float,
    count: int,
    noise_multiplier: float,
    generator: NoiseGenerator,
) -> FloatVector:
    """(Σ clipped changes + N(0, σ²C²)) / count.

    Args:
        clipped_sum: over the hospitals that answered, (parameters,); it is only read.
        clip: C, also the sensitivity: a hospital more or less moves the sum by at most C.
        count: of the hospitals that the run names, public and fixed. Never the number that answered: that depends on
            who is there, and then the divisor would reveal it.
        noise_multiplier: σ.
        generator: where the noise comes from.

    Returns:
        The mean change, (parameters,) in float32, with noise of standard deviation σ·C/count on every value.

    Raises:
        ConfigError: the clip, the count or the noise is not a positive number.
        UpdateRefused: the sum is not finite.
    """
    _check_clip(clip)
    if count < 1:
        raise ConfigError(f"the sum is divided by the run's fixed number of hospitals, at least 1; got {count}")
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ConfigError(f"the noise multiplier is a number above 0; got {noise_multiplier}")
    if not all(np.isfinite(clipped_sum[start : start + CHUNK]).all() for start in range(0, clipped_sum.size, CHUNK)):
        raise UpdateRefused("the sum of the updates is not finite")
    mean = generator.normal(clipped_sum.size)
    mean *= np.float32(noise_multiplier * clip / count)
    mean += (clipped_sum / count).astype(np.float32, copy=False)  # of the noise's own precision, and no finer
    return mean


def next_clip(
    clip: float, *, unclipped: int, clipped: int, count: int, adaptive: AdaptiveClip, generator: NoiseGenerator
) -> float:
    """C · exp(-η(b̃ - γ)), with b̃ = ½ + (Σ(bᵢ - ½) + N(0, σ_b²)) / count  (Andrew et al. 2021, §3.1).

    bᵢ is 1 where hospital i's change was unclipped. A hospital that did not answer counts as ½, so one more or less
    moves the sum by ½ at most.

    Args:
        clip: of this round.
        unclipped: changes of this round that were short enough.
        clipped: changes of this round that were not.
        count: the run's fixed number of hospitals.
        adaptive: quantile, rate and noise.
        generator: where the noise comes from.

    Returns:
        The clip of the next round. It is post-processing of a noised count, which `central_events` charges.

    Raises:
        ConfigError: the clip is not positive, or more answered than the run has hospitals.
    """
    if min(unclipped, clipped) < 0 or not 1 <= count >= unclipped + clipped:
        raise ConfigError("the counts of changes do not fit the run's fixed number of hospitals")
    return following_clip(
        clip, balance=(unclipped - clipped) / 2, expected=count, adaptive=adaptive, generator=generator
    )


def following_clip(
    clip: float, *, balance: float, expected: float, adaptive: AdaptiveClip, generator: NoiseGenerator
) -> float:
    """C · exp(-η(b̃ - γ)), with b̃ = ½ + (balance + N(0, σ_b²)) / expected, between 1e-6 and 1e6.

    A server that sees to it that every gradient is zero could else drive the clip to where float32 has no squares, and
    so no norms: gradients would then be clipped to nothing like the clip that the noise is made for.

    Args:
        clip: C, of now.
        balance: Σ(bᵢ - ½) over those who took part, of which each is ±½.
        expected: the fixed or expected number of them, public.
        adaptive: quantile γ, rate η and noise σ_b.
        generator: where the noise comes from.

    Raises:
        ConfigError: the clip is not positive.
    """
    _check_clip(clip)
    grid = min(grid_of(adaptive.count_noise), 0.5)  # a balance is a whole number of halves
    total = np.array([round(balance / grid)], np.int64)
    share = 0.5 + float(noised(total, adaptive.count_noise, grid, generator)[0]) / expected
    growth = math.exp(min(-adaptive.rate * (share - adaptive.quantile), FASTEST))
    return min(max(clip * growth, LEAST_CLIP), MOST_CLIP)


def shared_noise(noise_multiplier: float, quantile: float) -> tuple[float, AdaptiveClip]:
    """One release of noise multiplier σ as a sum and a count: the sum's own σ_s, and how the clip adapts.

    1/σ² = 1/σ_s² + 1/(2σ_b)²  (Andrew et al. 2021, theorem 1): the two are one Gaussian of a longer vector, so this
    holds as well where both come from one Poisson sample. Two events, sampled apart, would say less than is spent.
    """
    adaptive = AdaptiveClip(quantile=quantile, count_noise=noise_multiplier / (2 * math.sqrt(COUNT_SHARE)))
    return noise_multiplier / math.sqrt(1 - COUNT_SHARE), adaptive


def central_events(
    *, noise_multiplier: float, rounds: int, adaptive: AdaptiveClip | None = None, cohort: str = ""
) -> tuple[PrivacyEvent, ...]:
    """What so many rounds release: a noised sum each, and a noised count each where the clip adapts.

    Everyone takes part in every event, because the server's records show who answered: no sampling hides a hospital.
    The count's noise multiplier is 2σ_b, its sensitivity being ½ (Andrew et al. 2021, theorem 1, as two events).
    """
    update = PrivacyEvent(
        mechanism="gaussian",
        noise_multiplier=noise_multiplier,
        steps=rounds,
        unit="site",
        release="update",
        cohort=cohort,
    )
    if adaptive is None:
        return (update,)
    count = PrivacyEvent(
        mechanism="gaussian",
        noise_multiplier=2 * adaptive.count_noise,
        steps=rounds,
        unit="site",
        release="count",
        cohort=cohort,
    )
    return (update, count)


def _squares(part: FloatVector) -> float:
    wide = part.astype(np.float64)
    return float(wide @ wide)


def _check_clip(clip: float) -> None:
    if not (math.isfinite(clip) and clip > 0):
        raise ConfigError(f"the clip is a number above 0; got {clip}")
