"""Differential privacy at the server: the sensitivity is what it says, the noise is there, buffers stay."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedmed.errors import ConfigError, UpdateRefused
from fedmed.privacy.accounting import spent
from fedmed.privacy.central import (
    AdaptiveClip,
    central_events,
    clip_change,
    following_clip,
    next_clip,
    noised_mean,
)
from fedmed.privacy.grid import grid_of
from fedmed.privacy.noise import InsecureGenerator, SecureGenerator

CHANGES = [np.array(values, np.float32) for values in itertools.product((-3.0, -0.4, 0.0, 0.7, 5.0), repeat=2)]


class Silent(InsecureGenerator):
    """No noise, to see the sum."""

    def normal(self, size):
        return np.zeros(size, np.float32)

    def fine_normal(self, size):
        return np.zeros(size)


def exact_norm(vector) -> float:
    return math.sqrt(math.fsum(float(value) ** 2 for value in vector))


def test_p09_no_hospital_moves_the_mean_by_more_than_the_clip_over_the_count():
    clip, count, worst = 1.5, 4, 0.0
    for chosen in itertools.combinations_with_replacement(range(0, len(CHANGES), 3), 3):
        total = sum((clip_change(CHANGES[number], clip).change for number in chosen), np.zeros(2, np.float32))
        with_all, without = (
            noised_mean(each, clip=clip, count=count, noise_multiplier=1.0, generator=Silent(0))
            for each in (total, total - clip_change(CHANGES[chosen[0]], clip).change)
        )
        worst = max(worst, exact_norm(with_all.astype(float) - without.astype(float)))
    assert worst == pytest.approx(clip / count, rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    change=arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    clip=st.floats(1e-3, 1e3),
)
def test_p09_a_clipped_change_is_never_longer_than_the_clip(change, clip):
    clipped = clip_change(change, clip)
    assert exact_norm(clipped.change) <= clip
    assert clipped.unclipped == (clipped.norm_before <= clip)
    if clipped.unclipped:
        assert np.array_equal(clipped.change, change)
    elif clip / clipped.norm_before > 1e-30:
        assert exact_norm(clipped.change) >= clip * (1 - 1e-5)


def test_p09_a_zero_change_stays_zero():
    clipped = clip_change(np.zeros(5, np.float32), 1.0)
    assert clipped.scale == 1 and not clipped.change.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_p09_a_change_that_is_not_finite_is_refused(value):
    with pytest.raises(UpdateRefused, match="not finite"):
        clip_change(np.array([0.1, value], np.float32), 1.0)
    with pytest.raises(UpdateRefused, match="not finite"):
        noised_mean(np.array([value]), clip=1.0, count=2, noise_multiplier=1.0, generator=Silent(0))


def test_p09_noise_has_the_stated_variance_on_every_value():
    total = np.full(1_000_000, 6.0, np.float32)
    mean = noised_mean(total, clip=2.0, count=3, noise_multiplier=1.2, generator=SecureGenerator())
    assert mean.dtype == np.float32
    assert float(mean.mean(dtype=np.float64)) == pytest.approx(2.0, abs=0.005)
    assert float(mean.var(dtype=np.float64)) == pytest.approx((1.2 * 2.0 / 3) ** 2, rel=0.01)


def test_p09_a_silent_hospital_changes_neither_divisor_nor_noise():
    total = np.array([1.0, -2.0], np.float32)
    draws = [
        noised_mean(each, clip=1.0, count=4, noise_multiplier=2.0, generator=InsecureGenerator(1))
        for each in (total, np.zeros(2, np.float32))
    ]
    assert draws[0] - draws[1] == pytest.approx(total / 4, abs=1e-6)


def test_p09_epsilon_equals_dp_accountings():
    events = central_events(noise_multiplier=4.0, rounds=20, adaptive=AdaptiveClip(count_noise=5.0))
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    for sigma in (4.0, 10.0):
        accountant.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(sigma), 20))
    assert 0 <= spent(events, delta=1e-5).epsilon - accountant.get_epsilon(1e-5) <= 0.015
    assert [each.unit for each in events] == ["site", "site"] and all(each.sample_rate == 1 for each in events)


def test_p09_one_hospital_moves_the_count_of_unclipped_changes_by_half():
    adaptive, count = AdaptiveClip(quantile=0.5, rate=1.0), 5

    def share(unclipped: int, clipped: int) -> float:  # the exponent, without noise, gives the share back
        found = next_clip(
            1.0, unclipped=unclipped, clipped=clipped, count=count, adaptive=adaptive, generator=Silent(0)
        )
        return 0.5 - math.log(found)

    moves = [
        abs(share(unclipped + more, clipped + 1 - more) - share(unclipped, clipped))
        for unclipped in range(5)
        for clipped in range(5 - unclipped)
        for more in (0, 1)
    ]
    assert max(moves) == pytest.approx(0.5 / count) == min(moves)


def test_p09_a_clip_tells_no_more_of_the_count_than_its_noise_leaves():
    noise, expected = 3.7, 5.0
    grid, adaptive = grid_of(noise), AdaptiveClip(quantile=0.5, rate=1.0, count_noise=noise)
    for balance in (-1.0, 0.5, 2.0):
        clip = following_clip(1.0, balance=balance, expected=expected, adaptive=adaptive, generator=SecureGenerator())
        found = -math.log(clip) * expected / grid
        assert found == pytest.approx(round(found), abs=1e-3), "a multiple of the grid, whatever the count"


def test_p09_the_clip_finds_the_quantile_of_norms():
    norms, clip, adaptive = np.linspace(1, 9, 81), 0.01, AdaptiveClip(quantile=0.75, rate=0.2, count_noise=2.0)
    generator = InsecureGenerator(3)
    for _ in range(200):
        unclipped = int((norms <= clip).sum())
        clip = next_clip(
            clip, unclipped=unclipped, clipped=81 - unclipped, count=81, adaptive=adaptive, generator=generator
        )
    assert clip == pytest.approx(7, abs=0.7)


@pytest.mark.parametrize(
    "keys", [{"clip": 0.0}, {"clip": math.nan}, {"count": 0}, {"noise_multiplier": 0.0}, {"noise_multiplier": -1.0}]
)
def test_impossible_settings_are_refused(keys):
    with pytest.raises(ConfigError):
        noised_mean(np.zeros(2), **{"clip": 1.0, "count": 3, "noise_multiplier": 1.0, "generator": Silent(0), **keys})


def test_impossible_adaptive_clipping_is_refused():
    for keys in ({"quantile": 1.0}, {"rate": 0.0}, {"count_noise": 0.0}):
        with pytest.raises(ConfigError):
            AdaptiveClip(**keys)
    with pytest.raises(ConfigError, match="fixed number"):
        next_clip(1.0, unclipped=3, clipped=1, count=3, adaptive=AdaptiveClip(), generator=Silent(0))
