"""A network for each hospital, in whole runs: what is trained, reported, kept at the site and used by predict."""

import json

import numpy as np
import pytest
from kept_runs import FINDING, kept_run
from safetensors.numpy import load_file, save_file
from toy import FRAGILE
from typer.testing import CliRunner
from visits import Visits, flat, plain_steps

from fedmed.cli import app
from fedmed.errors import ModelError
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import check, local_grid, run_on
from fedmed.federated.strategies import STRATEGIES
from fedmed.training.evaluate import metrics_from, parted_sums, personal_sums
from fedmed.training.local_algorithms import KEEPS_STATE
from fedmed.training.predict.kept import load_kept
from fedmed.types import Weights

SITES = ("a-40", "b-20", "c-30")
pytestmark = pytest.mark.simulation


def bits(folder: RunFolder) -> dict[str, bytes]:
    """Every own network and every state of the sites of a run, and its last checkpoint."""
    last = max((folder.path / "checkpoints").glob("round-*.safetensors"))
    states = {f"{path.parent.parent.name}/{path.name}": path for path in folder.path.glob("sites/*/*/*.safetensors")}
    return {name: path.read_bytes() for name, path in {**states, last.name: last}.items()}


def personal(folder: RunFolder, site: str) -> dict[str, np.ndarray]:
    (path,) = (folder.path / "sites" / site).glob("*/personal.safetensors")
    return load_file(path)


def as_weights(tensors: dict[str, np.ndarray], layout) -> Weights:
    parts = (layout.parameters, layout.buffers)
    vectors = [np.concatenate([tensors[e.name].ravel() for e in part] or [[]]).astype(np.float32) for part in parts]
    return Weights(parameters=vectors[0], buffers=vectors[1])


def test_fine_tuning_is_some_steps_of_each_site_on_the_kept_network(toy_config, simulate, tmp_path):
    plain = toy_config(*SITES, server="server-50", evaluate={"bootstrap": 20})
    config = toy_config(
        *SITES, server="server-50", evaluate={"bootstrap": 20},
        strategy={"min_sites": 1, "personal_steps": 2, "personal_learning_rate": 0.2},
    )  # fmt: skip
    before, _ = simulate(plain)
    result, folder = simulate(config)
    assert result["server"] == before["server"], "the shared network is not touched"
    layout = flat(config).layout
    kept = as_weights(load_file(folder.path / "model.safetensors"), layout)
    for site in result["sites"]:
        own = {name.removeprefix("personal/") for name in site["metrics"] if name.startswith("personal/")}
        assert own == {name for name in site["metrics"] if not name.startswith("personal/")} > {"auroc", "auroc/a"}
        found = as_weights(personal(folder, site["site"]), layout)
        assert np.abs(found.parameters - kept.parameters).max() > 1e-3
    two_steps = plain_steps(config, "a-40", 0, kept, rate=0.2)  # of 16 images, of the 32 that a-40 trains on
    found = as_weights(personal(folder, "a-40"), layout)
    np.testing.assert_allclose(found.parameters, two_steps.parameters, rtol=0, atol=1e-6)
    for site, old in zip(result["sites"], before["sites"], strict=True):
        assert {name: site["metrics"][name] for name in old["metrics"]} == old["metrics"]


def test_ditto_reports_both_networks_and_sends_the_shared_one_alone(toy_config, simulate):
    keys = {"train": {"rounds": 3}, "evaluate": {"keep": "last"}}
    plain, _ = simulate(toy_config(*SITES, **keys))
    result, folder = simulate(toy_config(*SITES, strategy={"name": "ditto", "min_sites": 1}, **keys))
    assert result["status"] == "completed"
    run = Visits(toy_config(*SITES, strategy={"name": "ditto", "min_sites": 1}, **keys), folder.path / "sites")
    for site, old in zip(result["sites"], plain["sites"], strict=True):
        metrics = site["metrics"]
        assert {name: metrics[name] for name in old["metrics"]} == old["metrics"]
        assert metrics["personal/loss"]["value"] != metrics["loss"]["value"]
        assert metrics["personal/auroc"]["n"] == metrics["auroc"]["n"] > 0
        own = as_weights(personal(folder, site["site"]), flat(run.config).layout)
        kept = load_file(run.kept(site["site"], 3))
        np.testing.assert_array_equal(own.parameters, kept["own-parameters"])


def test_fedbn_has_no_metric_of_the_server_and_says_why(toy_config, simulate, tmp_path):
    model = {"name": "toy:network", "norm": "batch"}
    strategy = {"name": "fedbn", "min_sites": 1}
    config = toy_config(*SITES, server="server-50", model=model, strategy=strategy, train={"rounds": 3})
    result, folder = simulate(config)
    assert result["status"] == "completed"
    assert result["server"]["metrics"] == {"auroc": {"value": None, "low": None, "high": None, "n": None}}
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert "no single global network" in events[1]["server_metrics"]
    assert not [event for event in events if event["kind"] == "evaluated"]
    first, second = personal(folder, "a-40"), personal(folder, "b-20")
    shared = load_file(folder.path / "model.safetensors")
    for name, tensor in shared.items():
        norm = name.startswith("1.")
        assert np.array_equal(first[name], tensor) != norm, name
        assert np.array_equal(first[name], second[name]) != norm or name.endswith("tracked"), name
    run = Visits(config, folder.path / "sites")
    network = flat(config)
    weights = as_weights(shared, network.layout)
    number = json.loads((folder.path / "checkpoints" / "state.json").read_text())["run"]
    sums = run.evaluate("a-40", 3, weights, run=number).metrics
    expected = {site["site"]: site["metrics"] for site in result["sites"]}["a-40"]
    assert metrics_from(sums, config.task)["loss"] == pytest.approx(expected["loss"]["value"])
    alone = Visits(config, tmp_path / "nothing").evaluate("a-40", 3, weights).metrics
    assert metrics_from(alone, config.task)["loss"] != pytest.approx(expected["loss"]["value"])


def test_fedbn_without_norm_layers_is_refused_before_the_run(toy_config):
    model = {"name": "small-cnn", "norm": "none", "width": 2}
    data = {"dataset": "toy:dataset", "sites": list(SITES)}
    with pytest.raises(ModelError, match="this network has none"):
        check(toy_config(model=model, data=data, strategy={"name": "fedbn", "min_sites": 1}))


def test_a_site_without_held_out_patients_still_gets_its_network(toy_config, simulate):
    strategy = {"min_sites": 1, "personal_steps": 1}
    result, folder = simulate(toy_config("a-40", "b-20", strategy=strategy, evaluate={"site_share": 0.0}))
    assert result["status"] == "completed" and result["sites"][0]["metrics"] == {}
    assert len(list(folder.path.glob("sites/*/*/personal.safetensors"))) == 2


@pytest.mark.parametrize("name", sorted(KEEPS_STATE & STRATEGIES.keys()))
@pytest.mark.parametrize("until", ["update_received", "checkpoint_saved"])
def test_a_run_that_was_broken_off_ends_with_the_same_bits_at_every_site(toy_config, simulate, tmp_path, name, until):
    model = {"name": "toy:network", "norm": "batch"}
    config = toy_config(*SITES, model=model, strategy={"name": name, "min_sites": 1}, train={"rounds": 4})
    unbroken, whole = simulate(config)
    assert unbroken["status"] == "completed", unbroken["reason"]
    folder = RunFolder.create(tmp_path / "broken", config)

    def stop(event) -> None:
        if event["kind"] == until and event["round"] == 3:
            raise KeyboardInterrupt

    with local_grid(config, folder) as grid, pytest.raises(KeyboardInterrupt):
        run_on(grid, config, folder, stop)
    folder = RunFolder(folder.path)
    with local_grid(config, folder) as grid:
        run_on(grid, config, folder, lambda event: None)
    assert bits(folder) == bits(whole)


def test_a_site_killed_while_it_trains_its_own_network_goes_on(toy_config, simulate, tmp_path, monkeypatch):
    train = {"rounds": 2, "local_epochs": 3, "save_every_s": 1e-6, "batch_size": 8}
    found = {}
    for which, marker in (("whole", ""), ("killed", str(tmp_path / "marker"))):  # in the 15th batch: 12 are shared
        monkeypatch.setenv(FRAGILE, marker)
        strategy = {"name": "ditto", "min_sites": 1}
        result, folder = simulate(
            toy_config("a-40", "b-40", model={"name": "toy:fragile"}, train=train, strategy=strategy)
        )
        assert result["status"] == "completed", result["reason"]
        found[which] = bits(folder)
        assert not list(folder.path.glob("sites/*/unfinished*"))
    assert (tmp_path / "marker").read_text() == "killed"
    assert found["killed"] == found["whole"]


def test_sums_of_both_networks_are_told_apart():
    shared, own = {"loss": np.ones(1)}, {"loss": np.zeros(1)}
    assert parted_sums({**shared, **personal_sums(own)}) == (shared, own)


# fedmed predict RUN --site NAME.


@pytest.fixture
def run_with_own_networks(tmp_path):
    run = kept_run(tmp_path / "run", {"name": "kept_runs:spot"}, FINDING)
    shared = load_file(run / "model.safetensors")
    (run / "sites" / "east" / "first-0123").mkdir(parents=True)
    own = {name: tensor + np.float32(2) for name, tensor in shared.items()}
    save_file(own, run / "sites" / "east" / "first-0123" / "personal.safetensors")
    return run


def test_predict_uses_the_network_of_the_site_that_is_named(run_with_own_networks):
    shared, own = (load_kept(run_with_own_networks, site=site).network.vector for site in ("", "east"))
    np.testing.assert_array_equal(own.numpy(), shared.numpy() + 2)


def test_predict_names_the_sites_that_have_a_network(run_with_own_networks, tmp_path):
    for name in ("west", "../east", "east/first-0123"):
        with pytest.raises(ModelError, match="those with one: east"):
            load_kept(run_with_own_networks, site=name)
    arguments = ["predict", str(run_with_own_networks), str(tmp_path), "--site", "west"]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ModelError) and 'no site "west" of this run has a network of its own' in str(error)


def test_predict_refuses_the_shared_part_of_a_fedbn_network(run_with_own_networks):
    facts = json.loads((run_with_own_networks / "model.json").read_text())
    (run_with_own_networks / "model.json").write_text(json.dumps({**facts, "strategy": "fedbn"}))
    with pytest.raises(ModelError, match="no network for everybody"):
        load_kept(run_with_own_networks)
    assert load_kept(run_with_own_networks, site="east").labels == ("bright", "dark")
