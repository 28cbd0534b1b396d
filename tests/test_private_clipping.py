"""Clipping by layer and adaptive clipping under DP-SGD. Tests are named after the claims that they hold."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_privacy_training import pld, site_in, train
from test_training_private import PLAIN, Chosen, by_hand, network, patients, step, terms
from torch import nn

from fedmed.config import LEAST_CLIP, MOST_CLIP, PrivacyConfig
from fedmed.federated.admission import privacy_in
from fedmed.privacy.accounting import rdp_curve, spent
from fedmed.privacy.central import AdaptiveClip, following_clip, shared_noise
from fedmed.privacy.noise import InsecureGenerator
from fedmed.privacy.renyi import ORDERS
from fedmed.training.clipping import GradientClipper, layers_of
from fedmed.training.loop import RoundContext
from fedmed.training.losses import masked_bce
from fedmed.training.network import FlatNetwork
from fedmed.training.private import train_privately_, units_of
from fedmed.training.unfinished import Unfinished
from fedmed.types import PrivacyEvent

LAYERS = 3  # of the small network


def layer_norms(change: torch.Tensor, model: FlatNetwork) -> list[float]:
    parts: dict[str, list[torch.Tensor]] = {}
    for entry in model.layout.parameters:
        parts.setdefault(entry.name.rpartition(".")[0], []).append(change[entry.span])
    return [float(torch.cat(each).norm()) for each in parts.values()]


def test_p06_by_layer_every_layer_of_a_patients_gradient_is_clipped_to_its_share():
    data, model = patients(3), network()
    gradient = by_hand(data, math.inf)
    released = step(data, Chosen(), clipping="per-layer", max_grad_norm=0.3)
    share = 0.3 / math.sqrt(LAYERS)
    before, after = layer_norms(gradient, model), layer_norms(released, model)
    assert len(before) == LAYERS and max(before) > share
    assert after == pytest.approx([min(each, share) for each in before], rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_p06_by_layer_taking_a_patient_away_moves_the_sum_by_the_clip_at_most(count):
    changes = {"clipping": "per-layer", "max_grad_norm": 0.01, "expected_batch": 5.0, "units": 5}
    whole = step(patients(2, count, 1, 3, 1), Chosen(), **changes)
    apart = step(patients(2, count, 1, 3, 1, without=1), Chosen(), **changes)
    assert float((whole - apart).norm()) == pytest.approx(0.01, rel=1e-2)
    assert float((whole - apart).norm()) <= 0.01 * (1 + 1e-4)


class Nested(nn.Module):
    """Parameters at the root, in a layer, and in a layer inside a layer that has some of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.scale_more = nn.Linear(2, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.attention_after = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_every_trained_parameter_is_in_exactly_one_layer():
    module = Nested()
    layers = layers_of(module)
    for name, parameter in module.named_parameters():
        assert sum(name.startswith(layer) for layer in layers) == parameter.requires_grad, name
    assert len(layers_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == 2


def clipped_adaptively(data, source, steps: int, **changes) -> float:
    model, given = network(), terms(data, clipping="adaptive", steps=steps, **changes)
    units = units_of(data, np.arange(len(data)), PrivacyConfig())
    trained = train_privately_(
        model, data, units, PLAIN.model_copy(update={"learning_rate": 1e-9}), masked_bce, given,
        source=source, generator=np.random.default_rng(0), context=RoundContext(),
    )  # fmt: skip
    return float(trained.kept["clip"][0])


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("clipping", ["flat", "per-layer", "adaptive"])
def test_a_round_that_was_cut_off_ends_with_the_same_bits_and_the_same_bound(clipping, tmp_path):
    data = patients(1, 2, 3)
    given, units = (
        terms(data, clipping=clipping, steps=6, max_grad_norm=0.5, physical_batch=6),
        units_of(data, np.arange(6), PrivacyConfig()),
    )
    calls = 0

    def killing(logits, targets):
        nonlocal calls
        calls += 1
        if calls == 4 * 6 + 2:  # in the fifth step
            raise Killed
        return masked_bce(logits, targets)

    def go(loss, unfinished: Unfinished | None) -> tuple[bytes, float | None]:
        model = network()
        trained = train_privately_(
            model, data, units, PLAIN, loss, given, source=Chosen(), generator=np.random.default_rng(0),
            context=RoundContext(unfinished=unfinished),
        )  # fmt: skip
        return model.weights().parameters.tobytes(), float(trained.kept["clip"][0]) if trained.kept else None

    def kept() -> Unfinished:
        return Unfinished(path=tmp_path / "round.safetensors", identify=lambda: "this", every_s=0.0)

    with pytest.raises(Killed):
        go(killing, kept())
    assert go(killing, kept()) == go(masked_bce, None)
    assert calls == 4 * 6 + 2 + 2 * 6, "only the missing steps were taken"


def test_an_adaptive_clip_finds_the_quantile_of_the_gradients_norms():
    data = patients(*[2] * 9)
    norms = sorted(float(by_hand(patients(*[2] * 9).select(np.array(data.patients) == owner), math.inf).norm())
                   for owner in dict.fromkeys(data.patients))  # fmt: skip
    for start in (0.05, 20.0):
        clip = clipped_adaptively(data, Chosen(), 60, max_grad_norm=start, clip_quantile=0.5)
        assert norms[2] <= clip <= norms[6]


def test_p06_no_server_drives_an_adaptive_clip_to_where_norms_are_lost():
    """First a network without gradients, for as long as it takes; then gradients that float32 cannot square."""
    data = patients(1, 2)
    data = replace(data, targets=np.full_like(data.targets, np.nan))
    clip = clipped_adaptively(data, Chosen(), 150, max_grad_norm=1e-3, clip_quantile=0.01)
    assert clip == pytest.approx(LEAST_CLIP)
    small, layer = torch.full((2, 4), 1e-23), nn.Linear(4, 1, bias=False)
    clipper = GradientClipper(layer, max_norm=clip)
    clipper.accumulate_(lambda outputs, _: outputs.sum(1), small, small, torch.arange(2))
    assert float(layer.weight.grad.double().norm()) <= 2 * clip


def test_p06_an_adaptive_clip_stays_within_the_limits_of_the_setting():
    for balance, quantile, end in ((1e9, 0.01, LEAST_CLIP), (-1e9, 0.99, MOST_CLIP)):
        adaptive = AdaptiveClip(quantile=quantile)
        for clip in (LEAST_CLIP, 1.0, MOST_CLIP):
            assert following_clip(clip, balance=balance, expected=1.0, adaptive=adaptive, generator=Chosen()) == end


def test_p05_an_adaptive_step_noises_sum_and_count_as_it_says():
    data, sigma = patients(1, 2), 3.0
    given = terms(data, clipping="adaptive", noise_multiplier=sigma)
    assert given.adaptive is not None
    released = step(data, Chosen(sampled=[], noise=1.0), clipping="adaptive", noise_multiplier=sigma)
    torch.testing.assert_close(
        released, torch.full_like(released, given.gradient_noise * 0.5), rtol=1e-4, atol=1e-4
    )  # fmt: skip
    clip = clipped_adaptively(data, Chosen(sampled=[], noise=1.0), 1, noise_multiplier=sigma)
    assert clip == pytest.approx(0.5 * math.exp(-0.2 * (0.5 + given.adaptive.count_noise / 2 - 0.5)))


def test_p13_sum_and_count_of_one_sample_cost_what_the_event_says_and_two_events_would_say_less():
    sigma, rate, order = 0.8, 0.05, 6
    of_sum, adaptive = shared_noise(sigma, 0.5)
    of_count = 2 * adaptive.count_noise
    shift = 1 / of_sum**2 + 1 / of_count**2  # squared distance of the two centres, in units of the noise
    moments = sum(
        math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * math.exp((k * k - k) / 2 * shift)
        for k in range(order + 1)
    )
    event = PrivacyEvent(mechanism="sampled-gaussian", noise_multiplier=sigma, sample_rate=rate, steps=100)
    assert rdp_curve([event])[1][ORDERS.index(order)] == pytest.approx(100 * math.log(moments) / (order - 1), rel=1e-9)
    apart = [
        PrivacyEvent(mechanism="sampled-gaussian", noise_multiplier=each, sample_rate=rate, steps=100)
        for each in (of_sum, of_count)
    ]
    assert spent(apart, delta=1e-6).epsilon < spent([event], delta=1e-6).epsilon


def test_one_unit_moves_the_balance_by_half_and_the_clip_accordingly():
    class Silent(InsecureGenerator):
        def fine_normal(self, size):
            return np.zeros(size)

    adaptive = AdaptiveClip(quantile=0.5, rate=1.0)
    moved = [
        math.log(following_clip(1.0, balance=balance, expected=4.0, adaptive=adaptive, generator=Silent(0)))
        for balance in (-0.5, 0.0, 0.5)
    ]
    assert moved == pytest.approx([0.125, 0.0, -0.125])


@pytest.mark.parametrize("clipping", ["per-layer", "adaptive"])
def test_p13_a_run_with_another_clipping_spends_what_it_says(clipping, toy_config, tmp_path):
    config = toy_config(
        "a-400", train={"rounds": 2, "batch-size": 32, "learning-rate": 0.5},
        privacy={"mode": "dp-sgd", "noise-multiplier": 1.66, "epsilon": 3.0, "clipping": clipping},
    )  # fmt: skip
    site = site_in(tmp_path)
    for round in (1, 2):
        said = privacy_in(train(config, site, round).facts)
    assert [event["steps"] for event in said["events"]] == [2 * 5]
    truth = pld(said["events"], said["delta"])
    assert truth <= said["epsilon"] <= truth + 0.015
    kept = sorted(tmp_path.glob("toy-*/round-*.safetensors"))
    assert len(kept) == (2 if clipping == "adaptive" else 0)
    clips = [float(load_file(path)["clip"][0]) for path in kept]
    assert len(set(clips)) == len(clips)


def test_an_adaptive_clip_goes_on_where_the_round_before_ended(toy_config, tmp_path):
    config = toy_config(
        "a-400", train={"rounds": 3, "batch-size": 32, "learning-rate": 0.5, "local-steps": 1},
        privacy={"mode": "dp-sgd", "noise-multiplier": 1.66, "clipping": "adaptive", "noise": "insecure-test"},
    )  # fmt: skip
    site = site_in(tmp_path)
    once, again = (train(config, site, round).weights.parameters for round in (1, 1))
    assert np.array_equal(once, again), "a repeated round begins with the bound of the round before"
    train(config, site, 2)
    first, second = (float(load_file(path)["clip"][0]) for path in sorted(tmp_path.glob("toy-*/round-*.safetensors")))
    assert first != 1.0 and second != first
