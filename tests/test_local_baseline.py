"""A site's own network beside the federated one: trained from the same start, on the same budget, and never sent."""

import json
from dataclasses import replace

import numpy as np
import pytest
from visits import Visits, flat, mean_of

from fedmed.errors import DataError
from fedmed.metrics import classification_metrics, classification_sums
from fedmed.training.evaluate import predictions
from fedmed.training.local_baseline import train_baseline
from fedmed.training.network import FlatNetwork
from fedmed.training.own_patients import OwnPatients
from fedmed.training.site import site_data

SITES = ("a-200", "b-60")


@pytest.fixture
def ended(toy_config, tmp_path):
    """A run of three rounds at two sites, and the network that it ended with."""
    visits = Visits(toy_config(*SITES, train={"rounds": 3}, evaluate={"bootstrap": 200}), tmp_path)
    weights = flat(visits.config).weights()
    for round in (1, 2, 3):
        weights = mean_of([visits.train(site, round, weights, run="first") for site in SITES])
    visits.evaluate("a-200", 3, weights, run="first")
    return visits, weights


def alone(visits: Visits, site: str) -> FlatNetwork:
    """The same training as a loop by hand."""
    network = flat(visits.config)
    weights = network.weights()
    for round in range(1, visits.config.train.rounds + 1):
        network.load_(visits.train(site, round, weights).weights)
        weights = network.weights()
    return network


def auroc(visits: Visits, network: FlatNetwork, site: str) -> float:
    data = site_data(visits.site(site), visits.task(1, network.weights()).settings)
    rows = np.flatnonzero(data.evaluation)
    logits, targets = (np.concatenate(part) for part in list(zip(*predictions(network, data, rows), strict=True))[1:])
    sums = classification_sums(logits, targets, [data.patients[row] for row in rows])
    return classification_metrics(sums, visits.config.task.labels)["auroc"]


def test_a_site_learns_what_its_patients_gained_over_its_own_network(ended, tmp_path):
    visits, weights = ended
    told = []
    result = json.loads(train_baseline(visits.site("a-200"), lambda *rounds: told.append(rounds)).read_text())
    assert told == [(1, 3), (2, 3), (3, 3)]
    local, federated = result["arms"]
    shared = flat(visits.config)
    shared.load_(weights)
    other = Visits(visits.config, tmp_path / "other")
    assert local["value"] == pytest.approx(auroc(visits, alone(other, "a-200"), "a-200"), abs=2e-3)
    assert federated["value"] == pytest.approx(auroc(visits, shared, "a-200"), abs=2e-3)
    gain = federated["gain_over_local"]
    assert gain["value"] == pytest.approx(federated["value"] - local["value"])
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert (local["gain_over_local"], result["site"]) == (None, "a-200")


def test_few_patients_bear_no_interval(toy_config, tmp_path):
    visits = Visits(toy_config("a-20", train={"rounds": 1}), tmp_path)
    visits.evaluate("a-20", 1, visits.train("a-20", 1, flat(visits.config).weights()).weights)
    for arm in json.loads(train_baseline(visits.site("a-20"), lambda *_: None).read_text())["arms"]:
        assert (arm["low"], arm["high"]) == (None, None)
        assert arm["arm"] == "local" or arm["gain_over_local"]["low"] is None


@pytest.mark.parametrize(("count", "told"), [(9, False), (10, True)])
def test_few_patients_bear_no_interval_of_any_metric(toy_config, tmp_path, count, told):
    site = f"a-{10 * count}"  # of ten images the two of one patient are held out
    config = toy_config(site, train={"rounds": 1}, evaluate={"primary": "accuracy"})
    visits = Visits(config, tmp_path)
    visits.evaluate(site, 1, visits.train(site, 1, flat(config).weights()).weights)
    for arm in json.loads(train_baseline(visits.site(site), lambda *_: None).read_text())["arms"]:
        assert (arm["n"], arm["low"] is not None) == (count, told)


def test_a_killed_comparison_goes_on_after_its_last_round_and_a_new_run_begins_anew(ended, monkeypatch):
    visits, weights = ended

    def killed(round: int, rounds: int) -> None:
        if round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_baseline(visits.site("a-200"), killed)
    told = []
    path = train_baseline(visits.site("a-200"), lambda *rounds: told.append(rounds))
    assert told == [(3, 3)]
    first = path.read_text()
    monkeypatch.setattr(OwnPatients, "train_", None)
    assert train_baseline(visits.site("a-200"), print).read_text() == first
    monkeypatch.undo()
    visits.train("a-200", 2, weights, run="first")
    assert path.exists()
    visits.train("a-200", 1, weights, run="second")
    assert not path.exists()
    with pytest.raises(DataError, match="not in the first round"):
        train_baseline(visits.site("a-200"), print)


def test_a_site_that_was_not_there_has_nothing_to_compare(ended):
    visits, _ = ended
    with pytest.raises(DataError, match="wait for its end"):
        train_baseline(visits.site("b-60"), print)
    with pytest.raises(DataError, match="not in the first round of any run"):
        train_baseline(visits.site("c-60"), print)
    with pytest.raises(DataError, match="state-dir"):
        train_baseline(replace(visits.site("a-200"), state_dir=None), print)


def test_virtual_hospitals_keep_no_networks_for_it(toy_config, simulate):
    _, folder = simulate(toy_config(*SITES, train={"rounds": 1}))
    assert not list(folder.path.rglob("baseline"))
