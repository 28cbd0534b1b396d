"""What a benchmark's table says of its own figures."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def verdict():
    return runpy.run_path(str(FOLDER / "networks.py"))["verdict"]


@pytest.mark.parametrize(
    ("theirs", "ours", "ratio", "said"),
    [
        (100.0, 104.0, 1.04, "yes"),
        (100.0, 106.0, 1.06, "no"),
        (258.0, 275.5, 0.972, "unclear"),
        (100.0, 90.0, 1.2, "unclear"),
    ],
)
def test_two_ratios_that_disagree_about_the_bar_are_no_verdict(verdict, theirs, ours, ratio, said):
    assert verdict(theirs, ours, ratio) == said


def test_the_table_of_networks_says_what_follows_from_its_figures(verdict):
    lines = (FOLDER / "networks.md").read_text("utf-8").splitlines()
    _, *rows = [line for line in lines if line.startswith("| ")]  # the first one names the columns
    figures = [[cell.strip() for cell in row.split("|")[5:10]] for row in rows]
    assert figures
    for theirs, ours, ratio, _, said in figures:
        assert said == verdict(float(theirs), float(ours), float(ratio))


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "engine.py")))


def row_of(engine, name: str, **figures: float):
    known = {"steady_s": 1.0, "wall": 1.0, "cpu": 1.0, "first": 1.0, "memory": 0.0, "whole_s": 5.0}
    return engine.Row(**{"engine": name, "after_imports_s": 2.0, "text": "", **known, **figures})


def test_the_engines_figures_meet_a_bar_or_miss_it_as_they_are_shown(engine):
    plain, ours = row_of(engine, "plain PyTorch"), row_of(engine, "fedmed", wall=1.104, cpu=1.106, memory=1.2)
    ray = row_of(engine, "fedmed over Flower's Ray", steady_s=2.5, whole_s=12.0, after_imports_s=20.0)
    said = [line.rpartition(", ")[2] for line in engine.bars("small-cnn-32", [plain, ours, ray], full=False)]
    assert said == [
        "is 1.10: met",
        "is 1.11: missed",
        "is 1.00: met",
        "is 1.20: met",
        "is 2.50: met",
        "is 2.40: missed",
        "is 10.00: met",
    ]
    alone = engine.bars("densenet121-8", [plain, row_of(engine, "fedmed", first=1.6)], full=True)
    assert alone[-1] == (
        "bar densenet121-8, evaluation and checkpoints on: first round to a steady one, at most 1.50, is 1.60: missed"
    )
    assert len(alone) == 3, "memory was not read, and Ray not asked"


def test_only_the_default_way_to_add_an_update_has_a_bar():
    verdict = runpy.run_path(str(FOLDER / "aggregation.py"))["verdict"]
    assert [verdict("fedmed", ratio) for ratio in (2.9, 3.04, 3.06)] == ["met", "met", "missed"]
    assert {verdict(way, 9.0) for way in ("copy", "fedmed-norm", "flower")} == {"–"}


def test_an_algorithm_has_the_bar_of_the_steps_that_it_takes(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    algorithms = runpy.run_path(str(FOLDER / "algorithms.py"))
    said, name = algorithms["verdict"], "densenet121-8"
    assert said("plain PyTorch", name, 1.0, 1.0) == "– | –"
    assert said("scaffold", name, 1.104, 1.096) == "1.10 | met"
    assert said("feddg-ga", name, 1.10, 1.11) == "1.10 | missed: CPU"
    assert said("median", name, 1.11, 1.11) == "1.10 | missed: wall and CPU"
    assert [said("ditto", name, wall, 2.2) for wall in (2.2, 2.21)] == ["2.20 | met", "2.20 | missed: wall"]
    monkeypatch.setitem(said.__globals__, "CORES", 2)
    assert said("cyclic", name, 0.28, 0.15) == "0.28, CPU 0.14 | missed: CPU"
