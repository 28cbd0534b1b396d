"""What a benchmark's committed table says of its own figures."""

import runpy
from pathlib import Path

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
