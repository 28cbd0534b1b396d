"""What events cost: against dp-accounting, against the authors' own numerical composition, and by law."""

import math
import subprocess
import sys
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from prv_accountant import PRVAccountant
from prv_accountant.privacy_random_variables import PoissonSubsampledGaussianMechanism
from scipy.stats import binom

from fedmed.errors import ConfigError
from fedmed.privacy.accounting import PRV_ERROR, rdp_curve, rdp_epsilon, spent
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.types import PrivacyEvent


def event(sigma: float, rate: float = 1.0, steps: int = 1, **facts) -> PrivacyEvent:
    return PrivacyEvent(mechanism="sampled-gaussian", noise_multiplier=sigma, sample_rate=rate, steps=steps, **facts)


def by_pld(events, delta: float) -> float:
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    for each in events:
        gaussian = dp_accounting.GaussianDpEvent(each.noise_multiplier)
        once = gaussian if each.sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(each.sample_rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(once, each.steps))
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([event(1.0, 0.01, 1000)], 1e-5),
        ([event(0.8, 0.05, 500)], 1e-6),
        ([event(4.0, 0.1, 1000)], 1e-8),
        ([event(2.0, 0.001, 1)], 1e-5),
        ([event(4.2, 1.0, 50)], 1e-5),
        ([event(1.0, 0.02, 300), event(1.5, 0.01, 700), event(5.0)], 1e-6),
        ([event(10.0), event(20.0, steps=3), event(0.9, 0.004, 200)], 1e-6),
        ([event(1.1, 0.03, 40)] * 2, 1e-5),
    ],
)
def test_p13_epsilon_by_prv_lies_at_most_0_015_above_pld(events, delta):
    cost = spent(events, delta=delta)
    assert cost.accountant == "prv"
    assert 0 <= cost.epsilon - by_pld(events, delta) <= 0.015
    assert cost.epsilon < cost.epsilon_rdp


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([event(1.0, 0.01, 1000)], 1e-12),  # rounding reaches so thin a tail
        ([event(1.0, 0.1, 10_000)], 1e-5),  # an ε beyond any use
        ([event(50.0, 0.01, 100)], 1e-5),  # PRV's margin is more than the whole cost
    ],
)
def test_p13_where_prv_is_not_used_epsilon_is_a_bound_and_says_rdp(events, delta):
    cost = spent(events, delta=delta)
    assert cost.accountant == "rdp"
    assert cost.epsilon == cost.epsilon_rdp >= by_pld(events, delta)


def test_p13_prv_agrees_with_its_authors():
    mine = spent([event(1.2, 0.02, 800)], delta=1e-6).epsilon
    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=0.02, noise_multiplier=1.2)
    theirs = PRVAccountant(prvs=[mechanism], max_self_compositions=[800], eps_error=0.01, delta_error=1e-9)
    low, _, high = theirs.compute_epsilon(1e-6, [800])
    assert low <= mine <= high + 0.01


@pytest.mark.parametrize(("sigma", "rate"), [(0.5, 0.01), (1.0, 0.1), (4.0, 0.001), (1.3, 1.0)])
def test_p13_rdp_equals_dp_accountings_at_whole_orders_and_never_passes_it(sigma, rate):
    orders, mine = rdp_curve([event(sigma, rate, 7)])
    accountant = rdp.RdpAccountant(orders)
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    accountant.compose(gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian), 7)
    whole = orders == np.round(orders)
    assert mine[whole] == pytest.approx(accountant.rdp[whole], rel=1e-7, abs=1e-12)
    assert np.all(mine <= accountant.rdp * (1 + 1e-7) + 1e-12)


def test_p13_nothing_released_costs_nothing_and_no_noise_costs_everything():
    assert spent([], delta=1e-6).epsilon == 0
    assert spent([event(1.0, 0.1, 0)], delta=1e-6).epsilon == 0
    assert spent([event(1.0, 0.0, 10)], delta=1e-6).epsilon == 0
    assert spent([event(1.0), event(0.0)], delta=1e-6).epsilon == math.inf
    assert spent([event(0.0, 0.5)], delta=1e-6).epsilon == math.inf


def test_p13_order_and_splitting_of_events_change_nothing():
    whole = [event(1.1, 0.02, 300), event(3.0)]
    parts = [event(3.0), event(1.1, 0.02, 100), event(1.1, 0.02, 200)]
    assert spent(whole, delta=1e-6) == spent(parts, delta=1e-6)


def test_p09_sampling_of_sites_earns_no_amplification():
    sampled = event(4.0, 0.2, 10, unit="site")
    everyone = PrivacyEvent(mechanism="gaussian", noise_multiplier=4.0, steps=10, unit="site")
    assert spent([sampled], delta=1e-5) == spent([everyone], delta=1e-5)


@pytest.mark.parametrize(("sigma", "rate", "images"), [(1.5, 0.01, 8), (3.0, 0.05, 3), (4.0, 0.3, 2)])
def test_p02_images_are_charged_to_their_patient_and_never_below_the_exact_cost(sigma, rate, images):
    charged = spent([event(sigma, rate, 20, unit="image", images_per_patient=images)], delta=1e-6)
    accountant = pld.PLDAccountant(value_discretization_interval=5e-3)
    drawn = np.arange(images + 1)
    mixture = MixtureOfGaussiansDpEvent(sigma, drawn.tolist(), binom.pmf(drawn, images, rate).tolist())
    accountant.compose(dp_accounting.SelfComposedDpEvent(mixture, 20))
    exact = accountant.get_epsilon(1e-6)
    crude = spent([event(sigma / images, 1 - (1 - rate) ** images, 20)], delta=1e-6)  # whoever is drawn, wholly
    assert exact <= charged.epsilon < crude.epsilon
    assert charged.epsilon > spent([event(sigma, rate, 20)], delta=1e-6).epsilon


def test_p02_one_image_or_no_sampling_is_the_plain_mechanism():
    assert spent([event(1.0, 0.01, 100, unit="image")], delta=1e-6) == spent([event(1.0, 0.01, 100)], delta=1e-6)
    grouped = spent([event(8.0, unit="image", images_per_patient=4)], delta=1e-6)
    assert grouped == spent([event(2.0)], delta=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        event(-1.0),
        event(math.nan),
        event(1.0, 1.1),
        event(1.0, steps=-1),
        event(1.0, images_per_patient=0),
        PrivacyEvent(mechanism="gaussian", noise_multiplier=1.0, sample_rate=0.5),
    ],
)
def test_impossible_events_are_refused(wrong):
    with pytest.raises(ConfigError):
        spent([wrong], delta=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-6, math.nan])
def test_an_impossible_delta_is_refused(delta):
    with pytest.raises(ConfigError, match="delta"):
        spent([], delta=delta)


sigmas = st.floats(0.7, 8.0)
rates = st.sampled_from([0.002, 0.01, 0.05, 1.0])


@settings(max_examples=10, deadline=None)
@given(sigma=sigmas, rate=rates, steps=st.integers(1, 300), less=st.floats(1.05, 2.0), more=st.integers(1, 300))
def test_p13_epsilon_never_falls_with_more_steps_more_events_or_less_noise(sigma, rate, steps, less, more):
    base = event(sigma, rate, steps)
    before = spent([base], delta=1e-6)
    for heavier in (
        [replace(base, steps=steps + more)],
        [base, event(sigma * less, 0.01, more)],
        [replace(base, noise_multiplier=sigma / less)],
    ):
        after = rdp_epsilon(*rdp_curve(heavier), delta=1e-6)
        assert after >= before.epsilon_rdp - 1e-9
    assert spent([replace(base, noise_multiplier=sigma / less)], delta=1e-6).epsilon >= before.epsilon - 0.002


@settings(max_examples=15, deadline=None)
@given(sigma=sigmas, rate=rates, delta=st.sampled_from([1e-8, 1e-6, 1e-4]))
def test_p13_a_smaller_delta_never_costs_less(sigma, rate, delta):
    curve = rdp_curve([event(sigma, rate, 50)])
    assert rdp_epsilon(*curve, delta=delta / 10) >= rdp_epsilon(*curve, delta=delta)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(8.0, 0.016, 500), (1.0, 0.05, 100), (8.0, 1.0, 50), (0.02, 0.01, 100)]
)
def test_p13_calibrated_noise_keeps_the_budget_and_hardly_less_would_break_it(epsilon, rate, steps):
    sigma = noise_multiplier_for(epsilon=epsilon, delta=1e-5, sample_rate=rate, steps=steps)
    assert spent([event(sigma, rate, steps)], delta=1e-5).epsilon <= epsilon
    assert spent([event(sigma * 0.998, rate, steps)], delta=1e-5).epsilon > epsilon


def test_p13_calibration_counts_what_was_spent_before():
    further = [event(2.0, 0.01, 500)]
    sigma = noise_multiplier_for(epsilon=3, delta=1e-6, sample_rate=0.02, steps=200, further=further)
    alone = noise_multiplier_for(epsilon=3, delta=1e-6, sample_rate=0.02, steps=200)
    assert sigma > alone
    assert spent([*further, event(sigma, 0.02, 200)], delta=1e-6).epsilon <= 3
    with pytest.raises(ConfigError, match="already charged"):
        noise_multiplier_for(epsilon=0.1, delta=1e-6, sample_rate=0.02, steps=200, further=further)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ConfigError, match="budget"):
        noise_multiplier_for(epsilon=budget, delta=1e-6, sample_rate=0.1, steps=1)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(0.76, 0.032, 320), (1.0, 0.01, 1000), (2.0, 0.5, 20), (12.0, 0.9, 400)],
)
@pytest.mark.filterwarnings("ignore")  # of Opacus, about optimal orders and the logarithm of 1 - q
def test_p13_prv_without_the_rest_of_opacus_is_opacus_prv(sigma, rate, steps):
    from opacus.accountants import PRVAccountant as Whole

    whole = Whole()
    whole.history = [(sigma, rate, steps)]
    alone = spent([event(sigma, rate, steps)], delta=1e-6)
    assert alone.accountant == "prv"
    assert alone.epsilon == pytest.approx(whole.get_epsilon(1e-6, eps_error=PRV_ERROR, delta_error=1e-9), abs=1e-12)


def test_a_plan_needs_neither_torch_nor_the_rest_of_opacus():
    code = (
        "import sys; from fedmed.privacy.planning import plan_training as plan; "
        "plan(patients=500, epsilon=3, rounds=2, batch_size=50); print({'torch', 'opacus'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
