"""What sites do in a round under each algorithm, beside plain loops; and that a repeated round has the same bits."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F
from toy import dataset
from visits import Visits, flat, mean_of, plain_steps, squared_distance

from fedmed import config as run_file
from fedmed.errors import ConfigError, DataError, ModelError
from fedmed.federated.wire import encode_update
from fedmed.imaging.dataset import Dataset
from fedmed.training.gradients import constant, proximal
from fedmed.training.local_algorithms import Visit
from fedmed.training.local_algorithms.fedbn import NORM_LAYERS, norm_masks
from fedmed.training.local_algorithms.scaffold import path_length, scaffold
from fedmed.training.loop import RoundContext, train_
from fedmed.training.losses import masked_bce
from fedmed.training.network import FlatNetwork
from fedmed.training.schedule import learning_rate_factor
from fedmed.training.site_round import site_card, train_round
from fedmed.types import Weights

SITES = ("a-40", "b-20", "c-30")
STATEFUL = ("scaffold", "fedbn", "ditto")


@pytest.fixture
def visits(toy_config, tmp_path):
    """A function: a run under an algorithm at the toy sites."""

    def make(name: str, *, keep: bool = True, model=None, train=None, evaluate=None, **strategy) -> Visits:
        sections = {"strategy": {"name": name, "min_sites": 1, **strategy}, "evaluate": evaluate or {}}
        sections["train"] = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "batch_size": 8}
        sections["train"] |= train or {}
        config = toy_config(*SITES, model={"name": "toy:network", **(model or {})}, **sections)
        return Visits(config, tmp_path / "states" if keep else None)

    return make


def same(one: Weights, other: Weights) -> bool:
    return np.array_equal(one.parameters, other.parameters) and np.array_equal(one.buffers, other.buffers)


# FedProx.


def test_the_proximal_correction_is_the_gradient_of_the_penalty(visits):
    config = visits("fedprox").config
    network, anchor = flat(config), flat(config).weights()
    torch.manual_seed(3)
    network.vector.add_(torch.randn_like(network.vector))
    images, targets = torch.rand(6, 1, 8, 8), torch.ones(6, 2)
    masked_bce(network(images), targets).backward()
    proximal(network, anchor.parameters, 0.7)()
    corrected = torch.cat([parameter.grad.flatten() for parameter in network.parameters])
    network.module.zero_grad()
    (masked_bce(network(images), targets) + squared_distance(config, anchor, 0.7)(network.module)).backward()
    by_autograd = torch.cat([parameter.grad.flatten() for parameter in network.parameters])
    torch.testing.assert_close(corrected, by_autograd, rtol=0, atol=1e-6)


def test_fedprox_is_training_with_the_penalty_in_the_loss(visits):
    run = visits("fedprox", proximal=0.5)
    start = flat(run.config).weights()
    update = run.train("a-40", 1, start)
    expected = plain_steps(run.config, "a-40", 1, start, penalty=squared_distance(run.config, start, 0.5))
    np.testing.assert_allclose(update.weights.parameters, expected.parameters, rtol=0, atol=1e-6)
    assert np.abs(update.weights.parameters - plain_steps(run.config, "a-40", 1, start).parameters).max() > 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedprox_without_a_penalty_is_fedavg_bit_for_bit(visits, optimizer):
    train = {"optimizer": optimizer, "momentum": 0.9, "local_epochs": 2}
    start = flat(visits("fedavg").config).weights()
    plain = visits("fedavg", train=train).train("a-40", 1, start)
    assert same(visits("fedprox", train=train, proximal=0.0).train("a-40", 1, start).weights, plain.weights)
    for correction in (proximal, lambda network, anchor, _: constant(network, np.zeros_like(anchor))):
        assert np.array_equal(corrected_by_nothing(train, correction), corrected_by_nothing(train, None))


def corrected_by_nothing(train, correction) -> np.ndarray:
    """The weights after some steps with a correction that adds zero, or with none at all."""
    torch.manual_seed(0)
    network = FlatNetwork(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 1)), torch.device("cpu")
    )
    config = run_file.validate({"train": {key.replace("_", "-"): value for key, value in train.items()}}).train
    rng = np.random.default_rng(1)
    data = Dataset(
        images=rng.random((20, 1, 4, 4), dtype=np.float32),
        targets=rng.integers(0, 2, (20, 1)).astype(np.float32),
        patients=tuple(map(str, range(20))),
    )
    context = RoundContext(correction=correction and correction(network, network.weights().parameters, 0.0))
    train_(network, data, np.arange(20), config, masked_bce, np.random.default_rng(2), context)
    return network.weights().parameters


def test_a_parameter_that_the_loss_does_not_reach_is_left_alone():
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    network = FlatNetwork(module, torch.device("cpu"))
    module["used"](torch.ones(1, 2)).sum().backward()
    constant(network, np.full(6, 2.0, np.float32))()
    assert module["unused"].weight.grad is None
    torch.testing.assert_close(module["used"].weight.grad, torch.full((1, 2), 3.0))


# SCAFFOLD.


def test_scaffold_with_variates_at_zero_is_fedavg_bit_for_bit(visits):
    train = {"local_epochs": 3, "momentum": 0.9}
    weights = [flat(visits("fedavg").config).weights()] * 2
    for round in (1, 2, 3):
        for number, name in enumerate(("fedavg", "scaffold")):
            run = visits(name, train=train)
            run = replace(run, folder=run.folder / f"{name}-{round}")  # an empty one: its own variate is zero as well
            control = {"control": np.zeros_like(weights[number].parameters)} if round > 1 else {}
            weights[number] = mean_of([run.train(site, round, weights[number], control) for site in SITES])
        assert same(*weights)


def test_scaffold_on_a_small_network_is_the_loop_of_the_paper(visits):
    run = visits("scaffold")
    weights = flat(run.config).weights()
    control = np.zeros_like(weights.parameters)
    own = {site: np.zeros_like(control) for site in SITES}
    for round in (1, 2, 3):
        updates = []
        for site in SITES:
            update = run.train(site, round, weights, {"control": control} if round > 1 else {})
            expected = plain_steps(run.config, site, round, weights, added=control - own[site])
            np.testing.assert_allclose(update.weights.parameters, expected.parameters, rtol=0, atol=1e-6)
            moved = (weights.parameters - expected.parameters) / (update.facts["steps"] * 0.1)
            following = own[site] - control + moved
            own[site] = load_file(run.kept(site, round))["control"]
            np.testing.assert_allclose(own[site], following, rtol=0, atol=1e-5)
            updates.append(update)
        weights, control = mean_of(updates), np.mean(list(own.values()), axis=0)
    assert np.abs(control).max() > 1e-3


QUADRATICS = (([1, 2, 0.5], [1, -1, 2]), ([3, 0.2, 1], [-2, 0, 1]), ([0.5, 1, 2], [0, 4, -3]))  # (a, b) of each site


def quadratic_visit(a, b, config, round, w, vectors, kept) -> Visit:
    """F(w) = ½ Σ aₖ·(wₖ − bₖ)², of which every batch is the whole: three rows √aₖ·eₖ with targets √aₖ·bₖ."""
    network = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3, 1, bias=False)), torch.device("cpu"))
    received = Weights(parameters=w, buffers=np.zeros(0, np.float32))
    network.load_(received)
    root = np.sqrt(np.array(a, np.float32))
    images, targets = np.diag(root).reshape(3, 1, 1, 3), (root * np.array(b, np.float32)).reshape(3, 1)
    data = Dataset(images=images, targets=targets, patients=("x", "y", "z"))

    def train(*, correction=None, personal=False):
        loss, context = partial(F.mse_loss, reduction="sum"), RoundContext(round=round, correction=correction)
        order = np.random.default_rng(0)
        return train_(network, data, np.arange(3), config.train, lambda z, t: loss(z, t) / 2, order, context)

    return Visit(
        config=config, round=round, plateau=1.0, network=network, received=received, vectors=vectors, kept=kept,
        train_=train, held_out_loss=lambda: 0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "keys", [{}, {"momentum": 0.8}, {"schedule": "cosine", "rounds": 20, "momentum": 0.5}], ids=str
)
def test_scaffold_on_quadratics_is_three_lines_of_numpy(keys):
    train = {"optimizer": "sgd", "learning-rate": 0.05, "weight-decay": 0.0, "batch-size": 3, "local-epochs": 6, **keys}
    config = run_file.validate({"train": train, "strategy": {"name": "scaffold"}})
    w, c = np.zeros(3), np.zeros(3)
    own, kept = np.zeros((3, 3)), [{}, {}, {}]
    beta = keys.get("momentum", 0.0)
    for round in range(1, 6):
        for site, (a, b) in enumerate(QUADRATICS):
            outcome = scaffold(quadratic_visit(
                a, b, config, round, w.astype(np.float32), {"control": c.astype(np.float32)}, kept[site]
            ))  # fmt: skip
            y, velocity, length = w.copy(), np.zeros(3), 0.0
            for step in range(6):
                progress = round - 1 + (step + 0.5) / 6
                rate = 0.05 * ((1 + np.cos(np.pi * progress / 20)) / 2 if "schedule" in keys else 1)
                velocity = beta * velocity + (np.array(a) * (y - np.array(b)) - own[site] + c)
                y = y - rate * velocity
                length += rate * sum(beta**age for age in range(step + 1))
            following = own[site] - c + (w - y) / length
            np.testing.assert_allclose(outcome.weights.parameters, y, atol=2e-6)
            np.testing.assert_allclose(outcome.kept["control"], following, atol=2e-5)
            own[site], kept[site] = following, outcome.kept
        w, c = w - 0.1 * c, own.mean(axis=0)  # any step of the server will do


def test_scaffold_finds_the_common_optimum_where_fedavg_does_not():
    train = {"optimizer": "sgd", "learning-rate": 0.1, "weight-decay": 0.0, "batch-size": 3, "local-epochs": 5}
    curvature = sum(np.array(a) for a, _ in QUADRATICS)
    optimum = sum(np.array(a) * np.array(b) for a, b in QUADRATICS) / curvature
    distance = {}
    for corrected in (True, False):
        config = run_file.validate({"train": train, "strategy": {"name": "scaffold"}})
        w, c, kept = np.zeros(3, np.float32), np.zeros(3, np.float32), [{}, {}, {}]
        for round in range(1, 31):
            outcomes = [
                scaffold(quadratic_visit(a, b, config, round, w, {"control": c}, kept[site]))
                for site, (a, b) in enumerate(QUADRATICS)
            ]
            w = np.mean([outcome.weights.parameters for outcome in outcomes], axis=0)
            if corrected:
                kept = [outcome.kept for outcome in outcomes]
                c = np.mean([each["control"] for each in kept], axis=0)
        distance[corrected] = np.abs(w - optimum).max()
    assert distance[True] < 1e-3 < 0.1 < distance[False]


@pytest.mark.parametrize("keys", [{}, {"momentum": 0.9}, {"schedule": "cosine", "rounds": 4, "momentum": 0.3}], ids=str)
def test_the_length_of_the_path_is_how_far_equal_gradients_go(keys):
    settings = {"optimizer": "sgd", "learning-rate": 0.1, "weight-decay": 0.0, "local-steps": 7, **keys}
    config = run_file.validate({"train": settings}).train
    network = FlatNetwork(nn.Linear(1, 1, bias=False), torch.device("cpu"))
    before = network.vector.item()
    data = Dataset(images=np.ones((4, 1), np.float32), targets=np.ones((4, 1), np.float32), patients=tuple("abcd"))
    context = RoundContext(round=2)
    train_(network, data, np.arange(4), config, lambda logits, _: logits.mean(), np.random.default_rng(0), context)
    assert path_length(config, 2, 1.0, 7) == pytest.approx(before - network.vector.item(), rel=1e-5)


@pytest.mark.parametrize("keys", [{}, {"momentum": 0.9}, {"schedule": "cosine", "momentum": 0.3}], ids=str)
def test_the_path_of_more_steps_than_are_looked_at_one_by_one_is_as_long_as_theirs_together(keys):
    settings = {"optimizer": "sgd", "learning-rate": 0.1, "warmup-rounds": 2, "rounds": 4, **keys}
    config, steps = run_file.validate({"train": settings}).train, 25_001
    for round in (1, 3):
        momentum = expected = 0.0
        for step in range(steps):
            momentum = config.momentum * momentum + 1
            expected += 0.1 * momentum * learning_rate_factor(config, round - 1 + (step + 0.5) / steps)
        assert path_length(config, round, 1.0, steps) == pytest.approx(expected, rel=1e-6)


def test_the_path_of_any_number_of_steps_is_known_at_once():
    config = run_file.validate({"train": {"optimizer": "sgd", "learning-rate": 0.1, "momentum": 0.5}}).train
    assert path_length(config, 1, 1.0, 10**18) == pytest.approx(0.1 * 10**18 / 0.5)


@pytest.mark.parametrize(
    ("train", "what"),
    [({"optimizer": "adamw"}, "adamw"), ({"ema": 0.5}, "train.ema"), ({"patience": 1}, "train.patience")],
)
def test_a_site_refuses_scaffold_where_its_variates_are_no_mean_of_gradients(visits, train, what):
    run = visits("scaffold", train=train)
    with pytest.raises(ConfigError, match=what) as refusal:
        run.train("a-40", 1, flat(run.config).weights())
    assert refusal.value.public == str(refusal.value)


def test_a_site_goes_on_from_the_variate_of_the_last_round_that_the_server_has_used(visits):
    """Round 2 came too late, and its variate is not in the server's mean."""
    run, alone = visits("scaffold"), replace(visits("scaffold"), folder=visits("scaffold").folder / "alone")
    weights = flat(run.config).weights()
    control = {"control": np.full(weights.parameters.size, 0.01, np.float32)}
    for each, rounds in ((run, (1, 2)), (alone, (1,))):
        for round in rounds:
            each.train("a-40", round, weights, control)
    for round in (3, 4):
        sent = [each.train("a-40", round, weights, control, counted={"a-40": 1}) for each in (run, alone)]
        assert same(sent[0].weights, sent[1].weights)
        assert run.kept("a-40", round).read_bytes() == alone.kept("a-40", round).read_bytes()
    differs = run.train("a-40", 5, weights, control, counted={"a-40": 4})
    assert not same(differs.weights, alone.train("a-40", 5, weights, control, counted={"a-40": 1}).weights)


def test_a_control_variate_of_another_length_is_refused(visits):
    run = visits("scaffold")
    with pytest.raises(ModelError, match="another length"):
        run.train("a-40", 1, flat(run.config).weights(), {"control": np.zeros(3, np.float32)})


# FedBN.


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fedbn_is_a_loop_in_which_norm_layers_are_put_back(visits, norm):
    run = visits("fedbn", model={"norm": norm})
    network = flat(run.config)
    weights, masks = network.weights(), norm_masks(network)
    assert masks[0].sum() == 8 and masks[1].sum() == (9 if norm == "batch" else 0)
    own = dict.fromkeys(SITES, weights)
    for round in (1, 2, 3):
        updates, received = [], weights
        for site in SITES:
            start = Weights(
                parameters=np.where(masks[0], own[site].parameters, received.parameters),
                buffers=np.where(masks[1], own[site].buffers, received.buffers),
            )
            own[site] = plain_steps(run.config, site, round, start)
            updates.append(run.train(site, round, received))
            sent = updates[-1].weights
            np.testing.assert_array_equal(sent.parameters[masks[0]], received.parameters[masks[0]])
            np.testing.assert_array_equal(sent.buffers[masks[1]], received.buffers[masks[1]])
            np.testing.assert_allclose(sent.parameters[~masks[0]], own[site].parameters[~masks[0]], rtol=0, atol=1e-6)
            kept = load_file(run.kept(site, round))
            np.testing.assert_allclose(kept["parameters"], own[site].parameters[masks[0]], rtol=0, atol=1e-6)
            np.testing.assert_allclose(kept["buffers"], own[site].buffers[masks[1]], rtol=1e-6, atol=1e-6)
        weights = mean_of(updates)
    assert np.abs(own["a-40"].parameters[masks[0]] - own["b-20"].parameters[masks[0]]).max() > 1e-4


def test_no_value_of_a_norm_layer_leaves_the_site(visits):
    run = visits("fedbn", model={"norm": "batch"})
    start = flat(run.config).weights()
    start = Weights(parameters=start.parameters + np.float32(0.001), buffers=start.buffers)
    for round in (1, 2):
        update = run.train("a-40", round, start, evaluate=True)
        content = encode_update(update)
        sent = b"".join(array.data for record in content.array_records.values() for array in record.values())
        kept = load_file(run.kept("a-40", round))
        values = [value for value in kept["parameters"] if value not in start.parameters]
        values += [value for value in kept["buffers"][:8] if value not in start.buffers]
        assert len(values) > 10
        assert not [value for value in values if np.float32(value).tobytes() in sent]


def test_norm_layers_are_found_by_type_and_not_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Conv2d(1, 2, 1)
            self.scale = nn.GroupNorm(1, 2)
            self.stem = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.LayerNorm(3))

    network = FlatNetwork(Odd(), torch.device("cpu"))
    parameters, buffers = norm_masks(network)
    local = {entry.name for entry in network.layout.parameters if parameters[entry.span].all()}
    assert local == {"scale.weight", "scale.bias", "stem.1.weight", "stem.1.bias"}
    assert buffers.all() and parameters.sum() == 10
    assert all(issubclass(kind, nn.Module) for kind in NORM_LAYERS)


def test_fedbn_without_norm_layers_is_refused(visits):
    run = visits("fedbn", model={"norm": "instance"})  # of this network an identity
    with pytest.raises(ModelError, match="this network has none"):
        run.train("a-40", 1, flat(run.config).weights())


# Ditto.


@pytest.mark.parametrize("rate", [0.0, 0.03])
def test_ditto_is_fedavg_and_a_second_loop_with_the_penalty(visits, rate):
    run = visits("ditto", model={"norm": "batch"}, personal_penalty=0.5, personal_learning_rate=rate)
    plain = visits("fedavg", model={"norm": "batch"})
    weights = flat(run.config).weights()
    own = dict.fromkeys(SITES, weights)
    for round in (1, 2, 3):
        updates = []
        for site in SITES:
            updates.append(run.train(site, round, weights))
            assert same(updates[-1].weights, plain.train(site, round, weights).weights)
            penalty = squared_distance(run.config, weights, 0.5)
            own[site] = plain_steps(run.config, site, round, own[site], penalty=penalty, rate=rate or 0.1)
            kept = load_file(run.kept(site, round))
            np.testing.assert_allclose(kept["own-parameters"], own[site].parameters, rtol=0, atol=1e-6)
            np.testing.assert_allclose(kept["own-buffers"], own[site].buffers, rtol=1e-5, atol=1e-6)
        weights = mean_of(updates)


def test_ditto_without_a_penalty_trains_alone(visits):
    run = visits("ditto", personal_penalty=0.0)
    weights = alone = flat(run.config).weights()
    for round in (1, 2):
        run.train("a-40", round, weights)
        alone = plain_steps(run.config, "a-40", round, alone)
        weights = Weights(parameters=weights.parameters * np.float32(0.5), buffers=weights.buffers)
    np.testing.assert_allclose(load_file(run.kept("a-40", 2))["own-parameters"], alone.parameters, rtol=0, atol=1e-6)


# FedDG-GA.


def test_feddg_ga_sends_the_held_out_loss_before_and_after(visits):
    run = visits("feddg-ga")
    start = flat(run.config).weights()
    update = run.train("a-40", 1, start)
    for fact, weights in (("received", start), ("trained", update.weights)):
        network, (images, targets) = flat(run.config), held_out("a-40", run.config)
        network.load_(weights)
        expected = masked_bce(network(images), targets).item()
        assert update.facts[f"held-out-loss-{fact}"] == pytest.approx(expected, rel=1e-5)
    assert update.facts["held-out-loss-trained"] != update.facts["held-out-loss-received"]
    assert same(update.weights, visits("fedavg").train("a-40", 1, start).weights)


def held_out(name: str, config):
    data = dataset(Path(name), config)
    return data.batch(np.flatnonzero(data.evaluation))


def test_feddg_ga_refuses_sites_that_cannot_or_may_not_tell(visits):
    run = visits("feddg-ga")
    start = flat(run.config).weights()
    with pytest.raises(ConfigError, match="lets no metric leave"):
        train_round(run.task(1, start), run.site("a-40", metrics="none"))
    with pytest.raises(DataError, match="holds none out"):
        visits("feddg-ga", evaluate={"site_share": 0.0}).train("a-40", 1, start)


# Repeated rounds, and sites without a folder.


@pytest.mark.parametrize("name", STATEFUL)
def test_a_round_that_is_asked_again_ends_with_the_same_bits(visits, name):
    run = visits(name, model={"norm": "batch"})
    weights = flat(run.config).weights()
    control = np.full(weights.parameters.size, 0.01, np.float32) if name == "scaffold" else None
    vectors = {} if control is None else {"control": control}
    started, first = {}, {}
    for round in (1, 2, 3):
        started[round] = weights
        first[round] = run.train("a-40", round, weights, vectors)
        first[round, "kept"] = run.kept("a-40", round).read_bytes()
        weights = first[round].weights
    for round in (3, 2, 3):  # the answer was lost; then the run is resumed from an earlier checkpoint
        again = run.train("a-40", round, started[round], vectors)
        assert same(again.weights, first[round].weights)
        assert run.kept("a-40", round).read_bytes() == first[round, "kept"]
    without = replace(run, folder=run.folder / "lost").train("a-40", 3, started[3], vectors)
    sent = (without.weights.parameters, first[3].weights.parameters)
    assert np.array_equal(*sent) == (name == "ditto"), "what was kept does matter"


@pytest.mark.parametrize("keys", [*({"name": name} for name in STATEFUL), {"name": "fedavg", "personal_steps": 5}])
def test_a_site_without_a_folder_refuses_before_the_first_round(visits, keys):
    run = visits(keep=False, **keys)
    nothing = np.zeros(0, np.float32)
    with pytest.raises(ConfigError, match="needs a folder at the site") as refusal:
        site_card(run.task(0, Weights(parameters=nothing, buffers=nothing)), run.site("a-40"))
    assert refusal.value.public == str(refusal.value)


def test_algorithms_that_keep_nothing_leave_the_first_network_alone(visits):
    for name in ("fedavg", "fedprox", "feddg-ga"):
        run = visits(name)
        run.train("a-40", 1, flat(run.config).weights())
        assert [path.name for path in run.folder.glob("*/**/*") if path.is_file()] == ["first.safetensors"]


def test_what_sites_cannot_do_is_refused_in_the_run_file(toy_config):
    for sections, what in (
        ({"strategy": {"name": "scaffold"}, "train": {"layer_decay": 0.5}}, "train.layer-decay"),
        ({"strategy": {"name": "ditto", "personal_steps": 5}}, "strategy.personal-steps"),
        ({"strategy": {"name": "feddg-ga"}, "privacy": {"mode": "dp-sgd"}}, "un-noised losses"),
    ):
        with pytest.raises(ConfigError, match=what):
            toy_config(*SITES, **sections)
