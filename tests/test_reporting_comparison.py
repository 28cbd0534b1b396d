"""The pages of a comparison and of a sweep, from their JSON alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedmed.errors import DataError
from fedmed.reporting.comparison import write_comparison, write_sweep
from fedmed.reporting.words import p_value, signed

EVIL = "<script>document.title='owned'</script>"


def estimate(value: float | None, n: int | None = 30) -> dict[str, object]:
    spread = None if value is None else 0.05
    return {
        "value": value,
        "low": None if value is None else value - spread,
        "high": None if value is None else value + spread,
        "n": n,
    }


def comparison(site: str = "north", **changes: object) -> dict[str, object]:
    arms = {"local": 0.70, "fedavg": 0.78, "pooled": 0.80}
    places = [site, "server"]
    networks = {f"local:{site}": "local", "fedavg": "fedavg", "pooled": "pooled"}
    return {
        "schema": 1,
        "name": "chest",
        "task": "classification",
        "model": "chexnet",
        "primary": "auroc",
        "endpoint": "sites",
        "seeds": [7, 8, 9, 10, 11],
        "replicates": 1000,
        "intervals": "bootstrap of patients, Student's t of seeds",
        "budget": "the same",
        "arms": [
            {
                "arm": arm,
                "kind": arm,
                "endpoint": estimate(value),
                "by_seed": [value - 0.01, value + 0.01, None],
                "places": {place: estimate(value) for place in places},
                "worst": {"site": site, "value": value},
                "steps": 1200,
                "runs": [],
            }
            for arm, value in arms.items()
        ],
        "places": [{"place": place, "kind": "site", "patients": 30, "images": 60} for place in places],
        "matrix": [
            {"network": network, "arm": arm, "place": place, "metrics": {"auroc": estimate(arms[arm])}}
            for network, arm in networks.items()
            for place in places
        ],
        "comparisons": [
            {"first": "fedavg", "second": "pooled", "difference": -0.02, "low": -0.05, "high": 0.01}
            | {"p": 0.2, "p_holm": 0.0004}
        ],
        "subgroups": [
            {"place": site, "column": "sex", "group": "F", "arm": "fedavg", **estimate(0.75, 12)},
            {"place": site, "column": "sex", "group": "M", "arm": "fedavg", **estimate(None, None)},
        ],
        "notes": ["sites dropped out"],
        **changes,
    }


def grid(*keys: str) -> dict[str, object]:
    points = [
        {"values": dict(zip(keys, values, strict=False)), "endpoint": estimate(0.6 + 0.05 * i), "epsilon": epsilon}
        for i, (values, epsilon) in enumerate((((1.0, "a"), 1.2301), ((1.0, "b"), 1.0), ((100.0, "a"), None)))
    ]
    return {
        "schema": 1,
        "name": "grid",
        "primary": "auroc",
        "endpoint": "server",
        "keys": list(keys),
        "seeds": [1],
        "intervals": "bootstrap of patients",
        "points": points,
        "rows": [],
    }


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.text = path.read_text(encoding="utf-8")
        found = re.findall(r'<script type="application/json" data-plot="([\w-]+)">(.*?)</script>', self.text, re.DOTALL)
        self.figures = {name: json.loads(content) for name, content in found}
        self.feed(self.text)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if len(data) < 20_000:  # not plotly.js
            self.words += data + " "


def comparison_page(folder: Path, **changes: object) -> Page:
    (folder / "comparison.json").write_text(json.dumps(comparison(**changes)))
    return Page(write_comparison(folder))


def test_comparison_shows_arms_tests_matrix_and_subgroups(tmp_path: Path) -> None:
    page = comparison_page(tmp_path)
    assert list(page.figures) == ["plot-arms", "plot-differences", "plot-matrix"]
    assert "FedAvg − pooled −0.020 −0.050 to +0.010 0.200 < 0.001" in page.words
    assert "sex F FedAvg 0.750 (0.700–0.800) 12" in page.words
    assert "sex M FedAvg – –" in page.words, "suppressed"
    assert "sites dropped out" in page.words and "1,200" in page.words
    arms = page.figures["plot-arms"]["data"]
    assert len(arms[0]["x"]) == 6, "undefined seeds are left out"
    assert arms[1]["error_x"]["array"] == pytest.approx([0.05] * 3)
    assert page.figures["plot-matrix"]["data"][0]["z"] == [[0.7, 0.7], [0.78, 0.78], [0.8, 0.8]]


def test_page_asks_the_network_for_nothing_and_runs_no_name(tmp_path: Path) -> None:
    page = comparison_page(tmp_path, site=EVIL, name=EVIL)
    assert EVIL in page.words and page.tags.count("script") == 3 + 2
    assert "default-src 'none'" in page.text
    assert not {"img", "link", "iframe", "a"} & set(page.tags)


def test_undefined_comparison_has_a_page(tmp_path: Path) -> None:
    nothing = comparison()
    for arm in nothing["arms"]:  # type: ignore[attr-defined]
        arm |= {"endpoint": estimate(None), "worst": None}
        arm["places"] = dict.fromkeys(arm["places"], estimate(None))
    for cell in nothing["matrix"]:  # type: ignore[attr-defined]
        cell["metrics"] = {"auroc": estimate(None)}
    page = comparison_page(tmp_path, **{**nothing, "comparisons": [], "subgroups": [], "notes": []})
    assert page.figures == {} and "None" not in page.words


def test_sweep_draws_a_line_for_every_choice_of_the_other_keys(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(grid("privacy.epsilon", "model.norm")))
    page = Page(write_sweep(tmp_path))
    assert "1.24" in page.words and "1.230" not in page.words, "ε is rounded up"
    plot = page.figures["plot-points"]
    assert [line["name"] for line in plot["data"]] == ["model.norm = a", "model.norm = b"]
    assert plot["data"][0]["x"] == [1.0, 100.0] and plot["layout"]["xaxis"]["type"] == "log"
    (tmp_path / "sweep.json").write_text(json.dumps(grid("model.norm")))
    assert Page(write_sweep(tmp_path)).figures["plot-points"]["data"][0]["showlegend"] is False


@pytest.mark.parametrize("text", [None, "", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_refuses_what_is_no_comparison_in_one_line(tmp_path: Path, text: str | None) -> None:
    for name, write in (("comparison.json", write_comparison), ("sweep.json", write_sweep)):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name) as refusal:
            write(tmp_path)
        assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("*.html"))


def test_numbers_read_well() -> None:
    values = (0.0123, -0.5, 0.0, 0.00012, None)
    assert [signed(value) for value in values] == ["+0.012", "−0.500", "0.000", "+0.00012", "–"]
    assert [p_value(value) for value in (0.0312, 0.0002, None)] == ["0.031", "< 0.001", "–"]


@pytest.mark.browser
def test_browser_draws_every_plot_of_an_experiment(tmp_path: Path) -> None:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    comparison_page(tmp_path, site=EVIL)
    (tmp_path / "sweep.json").write_text(json.dumps(grid("privacy.epsilon", "model.norm")))
    write_sweep(tmp_path)
    for name, plots in (
        ("comparison.html", ("plot-arms", "plot-differences", "plot-matrix")),
        ("sweep.html", ("plot-points",)),
    ):
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=8000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
        shown = subprocess.run(
            [*command, (tmp_path / name).as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        for plot in plots:
            assert re.search(rf'id="{plot}"[^>]*>\s*<div class="plot-container', shown.stdout), f"{plot} was not drawn"
        assert "CONSOLE" not in shown.stderr, "the page logs no error and no blocked request"
