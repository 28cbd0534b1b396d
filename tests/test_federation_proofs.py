"""Federated equals pooled where mathematics says so, and is exact where it must be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from toy import dataset

from fedmed.federated import client_app
from fedmed.federated.aggregation import WeightedMean
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, run_on
from fedmed.models import build
from fedmed.training.losses import masked_bce
from fedmed.training.moments import second_moments, variances
from fedmed.training.network import FlatNetwork, layout_of
from fedmed.training.site import Site, settings_for_sites
from fedmed.training.site_round import train_round
from fedmed.types import Task, Weights

pytestmark = pytest.mark.simulation
SITES = ("a-40", "b-13", "c-7", "d-90")
WHOLE = {"batch_size": 1000, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "local_epochs": 1}


def zeros(layout) -> Weights:
    return Weights(
        parameters=np.zeros(layout.num_parameters, np.float32), buffers=np.zeros(layout.num_buffers, np.float32)
    )


def parameters(folder) -> np.ndarray:
    """The network after the last round."""
    return load_file(max((folder.path / "checkpoints").glob("round-*.safetensors")))["parameters"]


def pooled(config, steps: int, momentum: float = 0.0) -> np.ndarray:
    """Plain PyTorch on all sites' images at once, one full batch a step."""
    sets = [dataset(Path(site), config) for site in config.data.sites]
    batches = [each.batch(np.flatnonzero(~each.evaluation)) for each in sets]
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    network = build(config.model, outputs=2, seed=config.seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.train.learning_rate, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        masked_bce(network(images), targets).backward()
        optimizer.step()
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in network.parameters()])


@pytest.mark.parametrize("rounds", [1, 20])
def test_federated_sgd_equals_pooled_sgd(toy_config, simulate, rounds):
    config = toy_config(*SITES, train={**WHOLE, "rounds": rounds})
    _, folder = simulate(config)
    np.testing.assert_allclose(parameters(folder), pooled(config, rounds), rtol=0, atol=1e-6)


def test_server_momentum_equals_pooled_momentum(toy_config, simulate):
    strategy = {"name": "fedavgm", "server_momentum": 0.9, "min_sites": 1}
    config = toy_config(*SITES, train={**WHOLE, "rounds": 20, "learning_rate": 0.02}, strategy=strategy)
    _, folder = simulate(config)
    np.testing.assert_allclose(parameters(folder), pooled(config, 20, momentum=0.9), rtol=0, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_one_step_on_any_partition_equals_the_pooled_step(toy_config, counts):
    config = toy_config(*(f"site{number}-{count}" for number, count in enumerate(counts)), train=WHOLE)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"site_share": 0.0})})
    network = FlatNetwork(build(config.model, outputs=2, seed=config.seed), torch.device("cpu"))
    start = network.weights()
    task = Task(
        kind="train",
        round=1,
        settings=settings_for_sites(config),
        layout=network.layout.hash,
        weights=start,
        evaluate=False,
    )
    mean = WeightedMean(network.layout, start)
    for reference in config.data.sites:
        update = train_round(task, Site(name=reference, manifest=Path(reference), dataset="toy:dataset"))
        assert update.weights is not None
        mean.add(update.weights, update.num_examples)
    np.testing.assert_allclose(start.parameters + mean.result().change, pooled(config, 1), rtol=0, atol=1e-6)


def test_adam_is_not_pooled_adam_and_the_docs_say_so(toy_config, simulate):
    config = toy_config(*SITES, train={**WHOLE, "optimizer": "adam", "rounds": 3})
    _, folder = simulate(config)
    assert np.abs(parameters(folder) - pooled(config, 3)).max() > 1e-4
    assert "Adam" in (Path(__file__).parent.parent / "docs" / "federated-equals-pooled.md").read_text()


def test_permuting_sites_changes_no_bit(toy_config, simulate):
    first = parameters(simulate(toy_config(*SITES))[1])
    second = parameters(simulate(toy_config(*reversed(SITES)))[1])
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_same_seed_gives_the_same_bits_for_any_number_of_workers(toy_config, simulate, workers):
    one = parameters(simulate(toy_config(*SITES, simulation={"workers": 1, "device": "cpu"}))[1])
    many = parameters(simulate(toy_config(*SITES, simulation={"workers": workers, "device": "cpu"}))[1])
    np.testing.assert_array_equal(one, many)


def test_another_seed_gives_another_network(toy_config, simulate):
    first, second = toy_config(*SITES), toy_config(*SITES).model_copy(update={"seed": 8})
    assert np.abs(parameters(simulate(first)[1]) - parameters(simulate(second)[1])).max() > 1e-3


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), counts=st.lists(st.integers(2, 40), min_size=1, max_size=5))
def test_batchnorm_variance_pools_as_mean_of_variances_plus_variance_of_means(seed, counts):
    rng = np.random.default_rng(seed)
    layout = layout_of(torch.nn.BatchNorm1d(3))
    groups = [rng.normal(rng.normal(0, 3), 2, (count, 3)) for count in counts]
    mean = WeightedMean(layout, zeros(layout))
    for number, group in enumerate(groups):
        statistics = [group.mean(0), group.var(0), [number]]
        buffers = np.concatenate(statistics).astype(np.float32)
        mean.add(Weights(parameters=np.zeros(6, np.float32), buffers=buffers), len(group))
    result = mean.result().buffers
    everything = np.concatenate(groups)
    np.testing.assert_allclose(result[:3], everything.mean(0), atol=1e-4)
    np.testing.assert_allclose(result[3:6], everything.var(0), rtol=1e-4, atol=1e-4)
    assert result[6] == len(groups) - 1  # an integer counter is the largest, not a mean


def test_moments_are_their_own_way_back():
    layout = layout_of(torch.nn.BatchNorm1d(3))
    buffers = np.array([1, -2, 3, 0.5, 1, 2, 9], np.float32)
    np.testing.assert_allclose(variances(second_moments(buffers, layout), layout), buffers, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sites=st.integers(1, 8))
def test_the_mean_of_equal_updates_is_that_update(seed, sites):
    rng = np.random.default_rng(seed)
    layout = layout_of(torch.nn.Linear(50, 3))
    weights = Weights(parameters=rng.normal(size=153).astype(np.float32), buffers=np.zeros(0, np.float32))
    mean = WeightedMean(layout, zeros(layout))
    for _ in range(sites):
        mean.add(weights, float(rng.integers(1, 1000)))
    np.testing.assert_allclose(mean.result().change, weights.parameters, rtol=1e-6)


def test_the_weighted_mean_is_three_lines_of_numpy():
    rng = np.random.default_rng(0)
    layout = layout_of(torch.nn.Linear(400, 400))
    vectors = [rng.normal(size=layout.num_parameters).astype(np.float32) for _ in range(5)]
    weights, mean = [3, 1, 4, 1, 5], WeightedMean(layout, zeros(layout))
    for vector, weight in zip(vectors, weights, strict=True):
        mean.add(Weights(parameters=vector, buffers=np.zeros(0, np.float32)), weight)
    expected = np.average(np.array(vectors, np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(mean.result().change, expected, atol=1e-6)


def test_weighting_by_patients_and_uniformly_differ_from_images(toy_config, simulate):
    by = {
        how: parameters(simulate(toy_config(*SITES, strategy={"weight_by": how, "min_sites": 1}))[1])
        for how in ("images", "patients", "uniform")
    }
    assert np.abs(by["images"] - by["uniform"]).max() > 1e-4
    assert not np.array_equal(by["images"], by["patients"])


def refused_in_rounds_2_and_3(message, context):
    """The app of a site; what the second one says of its steps is not believed in two of the rounds."""
    reply = client_app.app(message, context)
    if message.metadata.message_type == "train" and context.node_id == 2 and message.metadata.group_id in "23":
        said = json.loads(reply.content["update"]["json"])
        said["facts"]["steps"] = 1000
        reply.content["update"] = ConfigRecord({"json": json.dumps(said)})
    return reply


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_scaffolds_variate_stays_the_mean_of_what_sites_kept_whoever_was_sampled_or_refused(
    toy_config, tmp_path, fraction
):
    weights = {"a-50": 50, "b-30": 30, "c-20": 20}
    strategy = {"name": "scaffold", "fraction": fraction, "keep_checkpoints": 9}
    config = toy_config(*weights, train={"rounds": 6}, strategy=strategy, evaluate={"site_share": 0.0})
    folder = RunFolder.create(tmp_path / "run", config)
    with local_grid(config, folder, client=refused_in_rounds_2_and_3) as grid:
        result = run_on(grid, config, folder, lambda event: None)
    used = {entry["round"]: entry["joined"] for entry in result["rounds_log"]}
    assert result["rounds"] == 6 and sum("b-30" not in joined for joined in used.values()) >= 2
    known, own = {}, dict.fromkeys(weights, 0.0)
    for round, joined in used.items():
        for site in joined:
            (file,) = (folder.path / "sites" / site).glob(f"*/round-{round:04d}.safetensors")
            own[site] = load_file(file)["control"]
            known[site] = weights[site]
        mean = np.mean(list(known.values()))
        expected = sum(known.get(site, mean) * own[site] for site in weights)
        expected = expected / sum(known.get(site, mean) for site in weights)
        control = load_file(folder.path / "checkpoints" / f"round-{round:04d}.safetensors")["state/control"]
        np.testing.assert_allclose(control, expected, rtol=0, atol=1e-5)
        assert np.abs(control).max() > 1e-3
