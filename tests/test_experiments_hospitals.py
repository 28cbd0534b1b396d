"""Experiments over hospitals that are dealt, and over networks that hospitals keep for themselves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from small_hospitals import hospital

from fedmed import config as run_file
from fedmed.errors import ConfigError, DataError
from fedmed.experiments.arms import changed, trials_of
from fedmed.experiments.compare import compare
from fedmed.experiments.dealing import dealt
from fedmed.experiments.predictions import _held_out, places_of
from fedmed.experiments.sweep import points_of, sweep
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.split import evaluation_rows
from fedmed.training.site import Site, settings_for_sites, site_data

pytestmark = pytest.mark.simulation
TINY: dict[str, object] = {"compare": ["federated"], "primary": "accuracy"}


def patients_of(config) -> list[set[str]]:
    """The patients of each site of a configuration."""
    found = []
    for path in config.data.sites:
        with Path(path).open(newline="") as file:
            found.append({row["patient_id"] for row in csv.DictReader(file)})
    return found


@pytest.fixture
def pictures(tmp_path):
    """A function: a run over one hospital of small pictures that is dealt to three; keys override [simulation]."""
    manifest = hospital(tmp_path / "all", 30, 0)

    def configure(evaluate: dict[str, object] | None = None, **simulation: object):
        return run_file.validate(
            {
                "model": {"name": "small-cnn", "width": 2},
                "task": {"labels": ["a", "b"]},
                "data": {"sites": [str(manifest)], "image-size": 16},
                "train": {"rounds": 1},
                "evaluate": {"seeds": 1, "bootstrap": 20, "site-share": 0.4, **(evaluate or {})},
                "simulation": {"device": "cpu", "workers": 1, "partition-sites": 3, **simulation},
            }
        )

    return configure


def test_every_arm_and_seed_trains_at_the_same_dealt_hospitals(pictures, tmp_path) -> None:
    config = dealt(pictures({"seeds": 2}, partition="iid"), tmp_path / "out")
    assert [len(patients) for patients in patients_of(config)] == [10, 10, 10]
    assert set.union(*patients_of(config)) == {f"p{number}" for number in range(30)}
    trials = trials_of(config, tmp_path / "out")
    assert {trial.network for trial in trials} == {
        "local:site-1",
        "local:site-2",
        "local:site-3",
        "federated",
        "pooled",
    }
    for trial in trials:
        assert trial.judges.data.sites == config.data.sites
        assert trial.config.simulation.partition == "as-given"
    again = dealt(pictures({"seeds": 2}, partition="iid"), tmp_path / "out")
    assert again == config and len(list((tmp_path / "out" / "hospitals").iterdir())) == 1


def test_other_partitions_are_dealt_beside_and_as_given_is_left_alone(pictures, tmp_path) -> None:
    points = points_of(pictures(), ["simulation.partition=as-given,iid,dirichlet", "strategy.name=fedavg,fedprox"])
    dealt_to = [dealt(point.config, tmp_path / "out").data.sites for point in points]
    assert dealt_to[0] == dealt_to[1] == pictures().data.sites
    assert dealt_to[2] == dealt_to[3] != dealt_to[4] == dealt_to[5]
    assert len(list((tmp_path / "out" / "hospitals").iterdir())) == 2


def test_patients_of_the_server_are_not_dealt_where_an_experiment_without_a_server_dealt_them(
    pictures, tmp_path
) -> None:
    config = pictures(partition="iid")
    dealt(config, tmp_path / "out")
    judged = changed(config, {"data": {"server": str(hospital(tmp_path / "server", 5, 1))}})
    with pytest.raises(DataError, match=r"data\.server: 5 of its patients are in data\.sites too"):
        dealt(judged, tmp_path / "out")


def test_hospitals_are_dealt_from_folders_of_one_name(pictures, tmp_path) -> None:
    """As `data/` of two sources, or a single one that is called as the server's place is."""
    for sources in (("x/data", "y/data"), ("server",)):
        sites = [str(hospital(tmp_path / name, 30, number)) for number, name in enumerate(sources)]
        found = compare(changed(pictures(TINY, partition="iid"), {"data": {"sites": sites}}), tmp_path / "out")
        assert [place["place"] for place in found["places"]] == ["site-1", "site-2", "site-3"]


@pytest.mark.parametrize("patients", [1, 2, 3])
def test_tiny_sites_are_judged_on_those_whom_their_runs_hold_out_under_privacy(tmp_path, patients: int) -> None:
    manifest = hospital(tmp_path / "tiny", patients, 0)
    config = run_file.validate(
        {
            "model": {"name": "small-cnn", "norm": "group"},
            "task": {"labels": ["a", "b"]},
            "data": {"sites": [str(manifest)], "image-size": 16},
            "evaluate": {"site-share": 0.01},
            "privacy": {"mode": "dp-sgd", "epsilon": 3.0},
        }
    )
    (place,) = places_of(config)
    _, judged = _held_out(place, config)
    trained = site_data(Site(name=place.name, manifest=manifest, virtual=True), settings_for_sites(config))
    assert judged.tolist() == np.flatnonzero(trained.evaluation).tolist()
    assert len(judged) == evaluation_rows(read_manifest(manifest, config.task), 0.01, config.split_seed, "tiny").sum()


def test_a_dealt_experiment_is_judged_at_its_hospitals(pictures, tmp_path) -> None:
    config = pictures({"compare": ["federated"], "primary": "accuracy"}, partition="iid")
    report = compare(config, tmp_path / "out")
    assert [place["place"] for place in report["places"]] == ["site-1", "site-2", "site-3"]
    swept = sweep(config, ["strategy.name=fedavg"], tmp_path / "out")
    assert swept["points"][0]["endpoint"] == report["arms"][0]["endpoint"], "the same run"


def test_a_site_is_judged_by_its_own_network_and_the_server_by_the_shared_one(toy_config, tmp_path) -> None:
    sites = [str(tmp_path / name) for name in ("a-60", "b-40")]
    config = toy_config(
        *sites, server=str(tmp_path / "s-60"), strategy={"personal_learning_rate": 0.5, "personal_penalty": 0.0},
        evaluate={"seeds": 1, "bootstrap": 20, "compare": ["fedavg", "ditto"], "primary": "accuracy"},
    )  # fmt: skip
    report = compare(config, tmp_path / "out")
    cells = {(cell["network"], cell["place"]): cell["metrics"] for cell in report["matrix"]}
    assert cells["ditto", "server"] == cells["fedavg", "server"]
    (run,) = (path for path in (tmp_path / "out" / "runs").iterdir() if path.name.startswith("ditto"))
    for site in json.loads((run / "result.json").read_text())["sites"]:
        for name in ("accuracy", "loss", "f1"):
            own, shared = (site["metrics"][f"{prefix}{name}"]["value"] for prefix in ("personal/", ""))
            assert cells["ditto", site["site"]][name]["value"] == pytest.approx(own, abs=1e-6)
            assert cells["fedavg", site["site"]][name]["value"] == pytest.approx(shared, abs=1e-6)
        assert site["metrics"]["personal/loss"]["value"] != site["metrics"]["loss"]["value"]
    assert "ditto is the site's own network" in report["notes"][0]


def test_fedbn_is_compared_at_the_sites_and_refused_where_the_server_judges(toy_config, tmp_path) -> None:
    sites = [str(tmp_path / name) for name in ("a-60", "b-40")]
    keys = {"seeds": 1, "bootstrap": 20, "compare": ["fedavg", "fedbn"]}
    report = compare(toy_config(*sites, evaluate=keys), tmp_path / "out")
    assert {cell["place"] for cell in report["matrix"] if cell["network"] == "fedbn"} == {"a-60", "b-40"}
    config = toy_config(*sites, server=str(tmp_path / "s-60"), evaluate=keys)
    for run in (lambda: compare(config, tmp_path / "new"), lambda: sweep(config, ["strategy.name=fedbn"], tmp_path)):
        with pytest.raises(ConfigError, match="no network for the server's patients"):
            run()
    assert not (tmp_path / "new" / "runs").exists()
