"""`fedmed compare` and `fedmed sweep` as a whole, on data that take no time."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import typer
from sklearn.metrics import roc_auc_score
from small_hospitals import hospital, lungs

from fedmed import config as run_file
from fedmed.cli import app
from fedmed.config import to_toml
from fedmed.errors import ConfigError, DataError, RunFailed
from fedmed.experiments import running
from fedmed.experiments.arms import trials_of
from fedmed.experiments.compare import compare
from fedmed.experiments.predictions import read_predictions
from fedmed.experiments.reuse import result_of
from fedmed.experiments.running import run_trials
from fedmed.experiments.sweep import points_of, sweep

pytestmark = pytest.mark.simulation
ARMS = ["local", "federated", "pooled"]


def toy(toy_config, root: Path, **sections: dict[str, object]):
    """Two sites and a server; the seeds are few."""
    evaluate = {"seeds": 2, "bootstrap": 100, "compare": ARMS, **sections.pop("evaluate", {})}
    sites = [str(root / "a-160"), str(root / "b-40")]
    return toy_config(*sites, server=str(root / "s-60"), evaluate=evaluate, **sections)


@pytest.fixture(scope="module")
def compared(toy_config, tmp_path_factory: pytest.TempPathFactory):
    """(configuration, folder, comparison.json) of one comparison."""
    root = tmp_path_factory.mktemp("compared")
    config = toy(toy_config, root)
    return config, root / "out", compare(config, root / "out")


def test_every_network_is_judged_everywhere(compared) -> None:
    _, folder, report = compared
    assert report == json.loads((folder / "comparison.json").read_text())
    cells = {(cell["network"], cell["place"]) for cell in report["matrix"]}
    networks = {"local:a-160", "local:b-40", "federated", "pooled"}
    assert cells == {(network, place) for network in networks for place in ("a-160", "b-40", "server")}
    assert [place["place"] for place in report["places"]] == ["a-160", "b-40", "server"]
    assert report["places"][1]["patients"] is None, "fewer than ten"
    assert report["places"][2]["patients"] > 10


def test_values_are_scikit_learns_on_the_kept_predictions(compared) -> None:
    config, folder, report = compared
    arms = {arm["arm"]: arm for arm in report["arms"]}
    values = []
    for run in arms["pooled"]["runs"]:
        cases = read_predictions(folder / "runs" / run, config)["a-160"]
        logits, targets = cases.scores["logits"], cases.scores["targets"]
        values.append(np.mean([roc_auc_score(targets[:, label], logits[:, label]) for label in range(2)]))
    assert arms["pooled"]["places"]["a-160"]["value"] == pytest.approx(np.mean(values), abs=1e-9)
    of_sites = [arms["local"]["places"][site]["value"] for site in ("a-160", "b-40")]
    assert arms["local"]["endpoint"]["value"] == pytest.approx(np.mean(of_sites))
    own = {(c["network"], c["place"]): c["metrics"]["auroc"]["value"] for c in report["matrix"]}
    assert of_sites == [own["local:a-160", "a-160"], own["local:b-40", "b-40"]], "each site's own network"
    at_server = [own["local:a-160", "server"], own["local:b-40", "server"]]
    assert arms["local"]["places"]["server"]["value"] == pytest.approx(np.mean(at_server))
    assert arms["local"]["worst"]["value"] == pytest.approx(min(of_sites))


def test_arms_have_the_same_budget(compared) -> None:
    _, _, report = compared
    assert {arm["arm"]: arm["steps"] for arm in report["arms"]} == {"local": 20, "federated": 20, "pooled": 20}


def test_too_few_seeds_give_no_p_value_and_say_so(compared) -> None:
    _, _, report = compared
    assert [(one["first"], one["second"]) for one in report["comparisons"]] == [
        ("federated", "pooled"),
        ("federated", "local"),
    ]
    for one in report["comparisons"]:
        assert one["p"] is None and one["p_holm"] is None
        assert one["difference"] is not None and (one["low"], one["high"]) == (None, None), "four patients of b-40"
    assert "no p-value" in report["notes"][0]


def test_site_learns_what_its_patients_gained(compared) -> None:
    _, folder, _ = compared
    own = json.loads((folder / "sites" / "b-40" / "comparison.json").read_text())
    assert own["site"] == "b-40" and own["arms"][0]["n"] == 4, "its own counts are its own"
    rows = {row["arm"]: row for row in own["arms"]}
    gain = rows["federated"]["gain_over_local"]["value"]
    assert gain == pytest.approx(rows["federated"]["value"] - rows["local"]["value"])
    assert rows["local"]["gain_over_local"] is None


def test_exact_counts_of_a_site_are_for_their_owner_alone(compared) -> None:
    _, folder, _ = compared
    for path in (folder / "sites").glob("*/comparison.json"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert (folder / "comparison.json").stat().st_mode & 0o044


def test_second_comparison_trains_nothing_again(compared, tmp_path) -> None:
    config, folder, report = compared
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/model.safetensors")}
    said = []
    extended = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"compare": (*ARMS, "fedavgm"), "seeds": 1})}
    )
    again = compare(extended, folder, watch=said.append)
    assert said[-1].done == said[-1].runs == 5 and said[-1].reused == 4
    assert stamps.items() <= {p: p.stat().st_mtime_ns for p in (folder / "runs").glob("*/model.safetensors")}.items()
    before = {arm["arm"]: arm["by_seed"][0] for arm in report["arms"]}
    assert {arm["arm"]: arm["by_seed"][0] for arm in again["arms"] if arm["arm"] in before} == before


def test_no_identifier_leaves_the_sites(compared) -> None:
    _, folder, _ = compared
    for path in folder.rglob("*"):
        if path.is_file() and "cache" not in path.parts:
            assert b"PLANTED" not in path.read_bytes(), path


def images(root: Path, make, task: dict[str, object], model: dict[str, object], **evaluate: object):
    """Two hospitals of tiny pictures."""
    sites = [str(make(root / name, patients, place)) for place, (name, patients) in enumerate((("n", 60), ("s", 10)))]
    return run_file.validate(
        {
            "model": model,
            "task": task,
            "data": {"sites": sites, "image-size": 16},
            "train": {"rounds": 1},
            "evaluate": {"seeds": 1, "bootstrap": 50, "site-share": 0.5, **evaluate},
            "simulation": {"device": "cpu"},
        }
    )


def test_subgroups_of_a_manifest_have_values_where_they_are_large_enough(tmp_path) -> None:
    model: dict[str, object] = {"name": "small-cnn", "width": 4}
    config = images(
        tmp_path, hospital, {"labels": ["a", "b"]}, model, compare=["federated", "pooled"], primary="accuracy"
    )
    report = compare(config, tmp_path / "out")
    by_sex = [row for row in report["subgroups"] if row["column"] == "sex"]
    assert {(row["place"], row["group"], row["arm"]) for row in by_sex} == {
        (place, group, arm) for place in "ns" for group in "FM" for arm in ("federated", "pooled")
    }
    for row in by_sex:
        if row["place"] == "s":  # five patients are held out there
            assert (row["value"], row["n"]) == (None, None)
        elif row["n"] is not None:
            assert row["n"] >= 10 and row["low"] <= row["value"] <= row["high"]
    assert any(row["n"] for row in by_sex)
    (pooled,) = (folder for folder in (tmp_path / "out" / "runs").iterdir() if folder.name.startswith("pooled"))
    result = result_of(pooled)
    assert result["sites"][0]["images"] == 2 * (60 + 10)
    judged = read_predictions(pooled, config)
    trained = sum(len(cases.row) for cases in judged.values())
    events = [json.loads(line) for line in (pooled / "events.jsonl").read_text().splitlines()]
    (received,) = (event for event in events if event["kind"] == "update_received")
    assert received["images"] == 2 * (60 + 10) - trained, "all but those that some site holds out"


def test_segmentation_is_compared_case_by_case(tmp_path) -> None:
    task: dict[str, object] = {"kind": "segmentation", "labels": ["lung"]}
    report = compare(images(tmp_path, lungs, task, {"name": "kept_runs:outline"}), tmp_path / "out")
    assert report["primary"] == "dice" and len(report["arms"]) == 3
    for arm in report["arms"]:
        assert 0.5 < arm["endpoint"]["low"] <= arm["endpoint"]["value"] <= arm["endpoint"]["high"] <= 1


def test_five_seeds_give_corrected_p_values(toy_config, tmp_path) -> None:
    keys = {"seeds": 5, "compare": ["federated", "pooled"], "family": ["pooled vs federated"]}
    config = toy(toy_config, tmp_path, evaluate={**keys, "endpoint": "server"}, train={"rounds": 1})
    report = compare(config, tmp_path / "out")
    (one,) = report["comparisons"]
    assert one["p_holm"] == one["p"] and 0 < one["p"] <= 1
    assert one["low"] <= one["difference"] <= one["high"]
    assert report["notes"] == [] and len(report["arms"][0]["by_seed"]) == 5
    values = {arm["arm"]: arm["endpoint"]["value"] for arm in report["arms"]}
    assert one["difference"] == pytest.approx(values["pooled"] - values["federated"])
    assert values == {arm["arm"]: pytest.approx(np.mean(arm["by_seed"])) for arm in report["arms"]}


def test_failing_site_stops_the_experiment_and_is_told(toy_config, tmp_path) -> None:
    config = toy_config(str(tmp_path / "a-40"), str(tmp_path / "nan-40"), evaluate={"seeds": 1, "bootstrap": 10})
    with pytest.raises(RunFailed, match="local-nan-40-seed7"):
        compare(config, tmp_path / "out")
    log = next((tmp_path / "out" / "logs").glob("local-nan-40*")).read_text()
    assert "error: " in log and "PLANTED" not in log


def test_killed_experiment_goes_on_where_it_was(toy_config, tmp_path) -> None:
    config = toy(toy_config, tmp_path, evaluate={"compare": ["federated"], "seeds": 2})
    trials = trials_of(config, tmp_path / "out")

    class Enough(Exception):
        pass

    def stop(standing) -> None:
        if standing.done == 1:
            raise Enough

    with pytest.raises(Enough):
        run_trials(trials, tmp_path / "out", jobs=1, watch=stop)
    finished = [path for path in (tmp_path / "out" / "runs").iterdir() if result_of(path)]
    assert len(finished) >= 1
    said = []
    run_trials(trials, tmp_path / "out", watch=said.append)
    assert said[-1].done == 2 and said[-1].reused >= 1


def test_refuses_what_cannot_be_compared_before_training(toy_config, tmp_path) -> None:
    for keys, text in (
        ({"compare": ["federated", "fedavgg"]}, "did you mean"),
        ({"endpoint": "server"}, "data.server"),
        ({"site-share": 0.0}, "nobody"),
    ):
        config = toy_config(str(tmp_path / "a-40"), str(tmp_path / "b-40"), evaluate={"seeds": 1, **keys})
        with pytest.raises(ConfigError, match=text):
            compare(config, tmp_path / "out")
        if "compare" not in keys:
            with pytest.raises(ConfigError, match=text):
                sweep(config, ["train.rounds=1,2"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("runs/*"))


def test_own_data_that_end_their_process_before_training_are_told_in_a_line(toy_config, tmp_path) -> None:
    config = toy_config(str(tmp_path / "crash-40"), evaluate={"seeds": 1, "site-share": 0.0})
    with pytest.raises(DataError, match=r'^data\.dataset: called for crash-40, "toy:dataset" ended its process'):
        compare(config, tmp_path / "out")


def test_without_data_phantom_hospitals_are_compared(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEDMED_PHANTOMS", str(tmp_path / "phantoms"))
    seen = []

    def noted(config: run_file.RunConfig, folder: Path) -> tuple[()]:
        seen.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr("fedmed.federated.phantoms.SITES", 2)
    monkeypatch.setattr("fedmed.federated.phantoms.PATIENTS", 4)
    monkeypatch.setattr("fedmed.experiments.compare.dealt", noted)
    monkeypatch.setattr("fedmed.experiments.sweep.dealt", noted)
    with pytest.raises(ConfigError, match="enough"):
        compare(run_file.RunConfig(), tmp_path / "out")
    with pytest.raises(ConfigError, match="enough"):
        sweep(run_file.RunConfig(), ["train.rounds=7,8"], tmp_path / "out")
    for config in seen:
        assert len(config.data.sites) == 2 and config.data.server and config.task.labels
    assert [config.train.rounds for config in seen] == [8, 7]


def test_refuses_manifests_that_hold_nobody_out_before_training(tmp_path) -> None:
    model: dict[str, object] = {"name": "small-cnn", "width": 4}
    config = images(tmp_path, hospital, {"labels": ["a", "b"]}, model, **{"site-share": 0.0})
    with pytest.raises(ConfigError, match="nobody"):
        compare(config, tmp_path / "out")
    with pytest.raises(ConfigError, match="nobody"):
        sweep(config, ["evaluate.site-share=0.2,0.0"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sweep_is_one_tidy_table(toy_config, tmp_path) -> None:
    config = toy(toy_config, tmp_path)
    report = sweep(config, ["train.rounds=1,2", "strategy.name=fedavg,fedavgm"], tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [tuple(point["values"].values()) for point in report["points"]] == [
        (1, "fedavg"), (1, "fedavgm"), (2, "fedavg"), (2, "fedavgm"),
    ]  # fmt: skip
    for point in report["points"]:
        assert len(point["by_seed"]) == 2 and point["epsilon"] is None
        assert point["endpoint"]["value"] == pytest.approx(np.mean(point["by_seed"]))
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    assert {row["place"] for row in rows} == {"server", "a-160", "b-40"}
    assert {(row["train.rounds"], row["strategy.name"], row["seed"]) for row in rows} == {
        (rounds, name, seed) for rounds in "12" for name in ("fedavg", "fedavgm") for seed in "78"
    }
    said = []
    report = compare(config, tmp_path / "out", watch=said.append)
    assert said[-1].reused == 2, "the federated arm of the comparison is a point of the sweep"


def test_a_point_that_diverges_ends_no_other(toy_config, tmp_path, capsys) -> None:
    run = tmp_path / "run.toml"
    config = toy(toy_config, tmp_path, evaluate={"seeds": 1}, train={"rounds": 1, "optimizer": "sgd"})
    run.write_text(to_toml(config))
    words = ["sweep", run, "--vary", "train.learning-rate=1e30,0.1", "--jobs", 1, "--out", tmp_path / "out", "--quiet"]
    assert app_command(*words) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: train.learning-rate=1e+30") and "failed" in out
    diverged, kept = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert (diverged["status"], diverged["endpoint"]["value"], diverged["by_seed"]) == ("failed", None, [None])
    assert kept["status"] == "completed" and kept["endpoint"]["value"] is not None
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    assert [row["value"] for row in rows if row["status"] == "failed"] == [""]
    assert {row["train.learning-rate"] for row in rows if row["status"] == "completed"} == {"0.1"}
    assert ">failed<" in (tmp_path / "out" / "sweep.html").read_text()


def test_a_seed_that_fails_fails_its_point_until_the_command_is_given_again(toy_config, tmp_path, monkeypatch) -> None:
    config = toy(toy_config, tmp_path, train={"rounds": 1})
    train = running.run_on

    def fails(grid, run, *rest: object, **keys: object) -> object:
        if run.seed == config.seed:
            raise RunFailed("the disk is full")
        return train(grid, run, *rest, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(running, "run_on", fails)  # runs are forked from here
        report = sweep(config, ["strategy.name=fedavg"], tmp_path / "out")
    (point,) = report["points"]
    assert (point["status"], point["endpoint"]["value"], point["by_seed"]) == ("failed", None, [None, None])
    assert [row["seed"] for row in report["rows"] if row["status"] == "failed"] == [config.seed]
    assert {row["seed"] for row in report["rows"] if row["value"] is not None} == {config.seed + 1}
    said = []
    report = sweep(config, ["strategy.name=fedavg"], tmp_path / "out", watch=said.append)
    assert report["points"][0]["status"] == "completed" and not report["failures"]
    assert (said[-1].done, said[-1].reused) == (2, 1)


@pytest.mark.parametrize(
    ("vary", "text"),
    [
        (["train.rounds"], "KEY=a,b,c"),
        (["train.rounds="], "KEY=a,b,c"),
        (["train.rounds=1", "train.rounds=2"], "twice"),
        (["seed=1,2"], "cannot be varied"),
        (["evaluate.primary=auroc,accuracy"], "judged alike"),
        (["evaluate.endpoint=sites,server"], "judged alike"),
        (["evaluate.resplit=true,false"], "judged alike"),
        (["evaluate.compare=local,pooled"], "judged alike"),
        (["evaluate.family=local vs pooled"], "judged alike"),
        (["train.round=1,2"], "did you mean train.rounds"),
        (["train.rounds=0"], "train.rounds"),
        ([], "missing"),
    ],
)
def test_refuses_a_grid_that_is_none(vary: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        points_of(run_file.validate({"task": {"labels": ["a"]}}), vary)


def app_command(*words: object) -> object:
    """The command's exit status, if it gives one."""
    return typer.main.get_command(app).main([str(word) for word in words], standalone_mode=False)


def test_commands_show_a_table_and_write_pages(toy_config, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    run = tmp_path / "run.toml"
    run.write_text(to_toml(toy(toy_config, tmp_path, evaluate={"seeds": 1})))

    def fedmed(*words: object) -> tuple[str, str]:
        app_command(*words)
        return capsys.readouterr()

    out, _ = fedmed("compare", run, "--out", tmp_path / "out")
    for words in ("federated vs pooled", "worst site", "bootstrap of patients, 1 seed", "note: 1 seed"):
        assert words in out
    for own in (tmp_path / "out" / "sites").iterdir():
        assert "trained here alone" in (own / "report.html").read_text(), "what its patients gained"
    out, err = fedmed("sweep", run, "--vary", "train.rounds=2", "--out", tmp_path / "out", "--json")
    assert json.loads(out)["points"][0]["values"] == {"train.rounds": 2}
    assert "1 of them reused" in err
    assert (tmp_path / "out" / "comparison.html").exists() and (tmp_path / "out" / "sweep.html").exists()
    out, _ = fedmed("sweep", run, "--vary", "train.rounds=2", "--out", tmp_path / "out", "--quiet")
    assert "sweep.csv" in out and "train.rounds" in out
    with pytest.raises(ConfigError, match="ARM vs ARM"):
        fedmed("compare", run, "--set", "evaluate.family=x", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_terminated_command_ends_its_runs(toy_config, tmp_path) -> None:
    """A parent that is interrupted passes it on once, and waits until nobody is left."""
    config = toy(toy_config, tmp_path, evaluate={"seeds": 1, "compare": ["federated"]}, train={"rounds": 400})
    seen = []

    def interrupt(standing) -> None:
        if standing.running and standing.rounds_done > 2 and not seen:
            seen.append(standing)
            os.kill(os.getpid(), signal.SIGINT)

    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt):
        run_trials(trials_of(config, tmp_path / "out"), tmp_path / "out", watch=interrupt)
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["reason"] == "interrupted by the user"
    assert set(psutil.Process().children(recursive=True)) <= before
