"""What is told of an experiment, and what is not: intervals, counts, steps, and who may judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy

from fedmed import config as run_file
from fedmed.cli.compare import _show as show_comparison
from fedmed.cli.sweep import _show as show_sweep
from fedmed.experiments.compare import compare, steps_of
from fedmed.experiments.judging import Bench, Drawn, mean_of
from fedmed.experiments.sweep import points_of

PLAIN = run_file.validate({"task": {"labels": ["a"]}})


def bench(seeds: int) -> Bench:
    return Bench(config=PLAIN, judged={}, seeds=tuple(range(seeds)))


def drawn(*values: float, spread: float = 0.02, **changes: object) -> Drawn:
    """A metric of as many seeds, at thirty patients."""
    rng = np.random.default_rng(0)
    replicates = np.array(values)[:, None] + spread * rng.normal(size=(1, 2000))
    found = Drawn(values=np.array(values), replicates=replicates, patients=30, smallest=30, fewest=15.0, highest=np.inf)
    return replace(found, **changes)


def test_few_patients_of_a_class_bear_no_interval_and_no_test() -> None:
    seeds = [0.7, 0.8, 0.75, 0.74, 0.71]
    enough, few = drawn(*seeds), drawn(*seeds, fewest=9.0)
    assert bench(5).estimate(enough)["low"] is not None and bench(5).estimate(few)["low"] is None
    other = drawn(*(value - 0.05 for value in seeds))
    assert bench(5).difference(enough, other, test=True).p < 0.05
    for pair in ((few, other), (other, few)):
        found = bench(5).difference(*pair, test=True)
        assert found.value is not None and (found.low, found.high, found.p) == (None, None, None)


@pytest.mark.parametrize(("patients", "told"), [(9, False), (10, True)])
def test_few_patients_bear_no_interval_and_no_test_under_dice(patients: int, told: bool) -> None:
    seeds = np.array([0.7, 0.8, 0.75, 0.74, 0.71])
    first = drawn(*seeds, patients=patients, fewest=np.inf)
    second = drawn(*(seeds - 0.05), patients=patients, fewest=np.inf)
    assert (bench(5).estimate(first)["low"] is not None) == told
    found = bench(5).difference(first, second, test=True)
    assert found.value is not None and [end is not None for end in (found.low, found.high, found.p)] == [told] * 3


def test_resamples_that_differ_by_the_same_bear_no_interval_and_no_test() -> None:
    found = bench(1).difference(drawn(0.75, spread=0.0), drawn(0.5, spread=0.0), test=True)
    assert (found.value, found.low, found.high, found.p) == (0.25, None, None, None)


def test_a_mean_over_sites_has_an_interval_where_each_bears_its_own_resampling() -> None:
    few = mean_of([drawn(0.7, fewest=2.0)] * 9, together=True)
    assert bench(1).estimate(few)["low"] is None, "two of the rarer class at each of nine sites"
    undefined = drawn(np.nan, fewest=0.0)
    both = mean_of([drawn(0.7), undefined], together=True)
    assert bench(1).estimate(both)["low"] is not None, "a site without the class does not count"
    dice = mean_of([drawn(0.8, patients=5, smallest=5, fewest=np.inf)] * 2, together=True)
    assert bench(1).estimate(dice)["low"] is not None, "ten patients of two sites"


def test_an_interval_ends_where_its_metric_does_and_has_a_width() -> None:
    wide = bench(2).estimate(drawn(0.9, 0.95, highest=1.0))
    assert 0 <= wide["low"] < 0.92 < wide["high"] == 1.0, "Student's t of two seeds is wide"
    assert bench(2).estimate(drawn(0.9, 0.95))["high"] > 1
    alike = bench(1).estimate(drawn(1.0, spread=0.0))
    assert (alike["value"], alike["low"], alike["high"]) == (1.0, None, None)


def test_a_sum_over_places_does_not_tell_a_small_one() -> None:
    places = [drawn(0.7), drawn(0.8, patients=4, smallest=4, fewest=2.0)]
    both = mean_of(places, together=True)
    assert (both.patients, both.fewest) == (34, 2) and bench(1).estimate(both)["n"] is None
    assert bench(1).estimate(mean_of([places[0]] * 2, together=True))["n"] == 60
    assert bench(1).estimate(mean_of([places[0]] * 2, together=False))["n"] == 30


def test_steps_count_each_update_of_a_finished_round_once(tmp_path: Path) -> None:
    """Round 2 was broken off and repeated; in it site b was first heard and then not."""
    events = [(1, "a", 3), (1, "b", 4), (2, "a", 3), (2, "b", 4), (2, "a", 5), (3, "a", 7)]
    told = [{"kind": "update_received", "round": r, "site": s, "steps": steps} for r, s, steps in events]
    log = [{"round": 1, "joined": ["a", "b"]}, {"round": 2, "joined": ["a"]}]
    (tmp_path / "result.json").write_text(json.dumps({"status": "degraded", "rounds_log": log}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    assert steps_of(tmp_path) == 3 + 4 + 5


@pytest.mark.simulation
def test_steps_that_sites_do_not_tell_are_not_shown(toy_config, tmp_path: Path, capsys) -> None:
    config = toy_config(
        str(tmp_path / "a-40"),
        str(tmp_path / "b-40"),
        privacy={"mode": "central", "noise-multiplier": 0.05, "max-grad-norm": 0.3, "sites": 2},
        strategy={"weight-by": "uniform"},
        train={"rounds": 1},
        evaluate={"keep": "last", "seeds": 1, "bootstrap": 10, "compare": ["federated", "pooled"]},
    )
    report = compare(config, tmp_path / "out")
    assert [arm["steps"] for arm in report["arms"]] == [None, None]
    show_comparison(report)
    assert "None" not in capsys.readouterr().out


def listed(reference: Path, config) -> object:
    """A data set of the user's own over a CSV whose lines are not in the order of its rows."""
    return toy.dataset(reference.with_suffix(""), config)


@pytest.mark.simulation
def test_own_data_sets_have_no_subgroups_and_arms_say_what_they_take(toy_config, tmp_path: Path) -> None:
    lines = ["patient_id,image,sex", *(f"p,{row}.png,{'FM'[row // 2 % 2]}" for row in range(240))]
    paths = [tmp_path / name / f"{name}-240.csv" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("\n".join(lines))
    config = toy_config(
        *map(str, paths),
        data={"dataset": f"{__name__}:listed"},
        train={"rounds": 1},
        evaluate={"seeds": 1, "bootstrap": 10, "compare": ["ditto", "feddg-ga"], "family": ["ditto vs feddg-ga"]},
    )
    report = compare(config, tmp_path / "out")
    assert report["places"][0]["patients"] == 24 and report["subgroups"] == []
    notes = " ".join(report["notes"])
    assert "further steps for their own networks under ditto, which the budget leaves out" in notes
    assert "feddg-ga weights sites by losses on their held-out patients" in notes


def test_varied_paths_are_relative_to_the_run_file(tmp_path: Path) -> None:
    (point,) = points_of(PLAIN, ["model.weights=own.safetensors"], tmp_path)
    assert point.config.model.weights == str(tmp_path / "own.safetensors")
    assert point.values == {"model.weights": "own.safetensors"}


def test_a_sweep_never_shows_less_than_was_spent(capsys) -> None:
    estimate = {"value": 0.5, "low": None, "high": None, "n": 30}
    points = [
        {"values": {"seed": 1}, "status": "completed", "endpoint": estimate, "epsilon": value}
        for value in (1.2301, None)
    ]
    found = {"primary": "auroc", "endpoint": "sites", "keys": ["seed"], "seeds": [1], "intervals": "x"}
    show_sweep({**found, "points": points})
    shown = capsys.readouterr().out
    assert "1.24" in shown and "1.23" not in shown
