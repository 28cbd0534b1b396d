from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go  # type: ignore[import-untyped]
import pytest
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from fedmed.errors import DataError
from fedmed.reporting import write_report
from fedmed.reporting.read import read_run
from fedmed.reporting.words import duration, epsilon, number, ranges, troubles

Json = dict[str, object]
SECTIONS = ["metrics", "rounds", "per-site", "cases", "participation", "sites", "facts", "repeat"]


def estimate(value: float | None, spread: float = 0.03, patients: int | None = 120) -> Json:
    if value is None:
        return {"value": None, "low": None, "high": None, "n": patients}
    return {"value": value, "low": value - spread, "high": value + spread, "n": patients}


def site(name: str, auroc: float | None, **changes: object) -> Json:
    row: Json = {"site": name, "patients": 80, "images": 200, "rounds_joined": 5, "privacy": None}
    return row | {"metrics": {"auroc": estimate(auroc, 0.05, 16), "loss": estimate(0.5)}} | changes


def entry(round_: int, joined: list[str], failed: dict[str, str], auroc: float | None = 0.8) -> Json:
    return {
        "round": round_,
        "joined": joined,
        "failed": [{"site": name, "reason": reason} for name, reason in failed.items()],
        "seconds": 9.1,
        "server_metrics": {"auroc": estimate(auroc), "loss": estimate(0.9 - 0.08 * round_)},
    }


def result(**changes: object) -> Json:
    names = [f"site-{i}" for i in range(1, 5)]
    log = [entry(0, [], {}, 0.51)]
    log += [entry(i, names, {}, 0.6 + 0.06 * i) for i in range(1, 6)]
    base: Json = {
        "schema": 1,
        "run_id": "run-0001",
        "name": "quickstart",
        "status": "completed",
        "reason": None,
        "model": "chexnet",
        "task": "classification",
        "strategy": "fedavg",
        "rounds": 5,
        "seed": 7,
        "versions": {"fedmed": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0"},
        "server": {
            "metrics": {
                "loss": estimate(0.41),
                "auroc": estimate(0.91),
                "auroc/nodule": estimate(0.93),
                "auroc/effusion": estimate(None),
            }
        },
        "sites": [site(name, 0.85 + 0.02 * place) for place, name in enumerate(names)],
        "rounds_log": log,
        "timing": {"total_s": 62.5, "train_s": 51.0, "overhead_s": 3.2},
        "peak_memory_mib": 1530.4,
    }
    return base | changes


EVALUATION: Json = {
    "kind": "classification",
    "labels": ["nodule", "effusion"],
    "curves": {
        "nodule": {"false_positive_rate": [0.0, 0.1, 0.4, 1.0], "true_positive_rate": [0.0, 0.7, 0.95, 1.0]},
        "effusion": None,
    },
}


def write_run(folder: Path, facts: Json, evaluation: Json | None = None, events: list[Json] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(facts))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


class Page(HTMLParser):
    """Elements, their attributes, figures and visible text of a report, without plotly's own source."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, Json] = {}
        self.styles = ""
        self._open = ""
        self._figure: str | None = None
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._open = tag
        self._figure = dict(attrs).get("data-plot")

    def handle_endtag(self, tag: str) -> None:
        self.text += " "
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            if self._figure:
                self.figures[self._figure] = json.loads(data)
        elif self._open == "style":
            self.styles += data
        else:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.tags if name == tag and "id" in attributes]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", result(), EVALUATION)


def test_report_holds_every_section_in_order(run: Path) -> None:
    page = page_of(run)
    assert page.ids("section") == SECTIONS
    assert list(page.figures) == ["plot-rounds", "plot-sites", "plot-cases", "plot-participation"]


def test_summary_is_one_plain_sentence(run: Path) -> None:
    sentence = (
        "CheXNet trained by 4 sites for 5 rounds; held-out AUROC 0.910 (95 % interval 0.880–0.940, 120 patients)."
    )
    assert sentence in page_of(run).words


def test_figures_are_valid_for_plotly_itself(run: Path) -> None:
    for figure in page_of(run).figures.values():
        go.Figure(figure)  # raises on an unknown or impossible property


def test_report_asks_the_network_for_nothing(run: Path) -> None:
    page = page_of(run)
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "base", "object", "embed", "form", "a"}
        assert not attributes.keys() & {"src", "href", "srcset", "action"}
    assert "url(" not in page.styles and "@import" not in page.styles
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and "default-src 'none'" in policy
    source = get_plotlyjs()
    assert (run / "report.html").read_text().count(source) == 1
    assert "</script" not in source.lower()


def test_every_figure_and_table_says_what_it_is(run: Path) -> None:
    page = page_of(run)
    plots = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(plots) == 4
    assert all(attributes["aria-label"] for attributes in plots)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 0


def test_script_in_names_and_reasons_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><a href='https://evil.example'>x</a>"
    facts = result(
        name=evil,
        status="degraded",
        reason=evil,
        sites=[site(evil, 0.8)],
        rounds_log=[entry(1, [], {evil: evil})],
    )
    curves = {evil: {"false_positive_rate": [0, 1], "true_positive_rate": [0, 1]}}
    page = page_of(write_run(tmp_path / "run", facts, {"kind": "classification", "labels": [evil], "curves": curves}))
    assert [tag for tag, _ in page.tags].count("script") == 4 + 2
    assert "a" not in [tag for tag, _ in page.tags]
    assert evil in page.text
    assert "<a" not in json.dumps(page.figures), "plotly turns <a> in a label into a link"


def test_degraded_run_says_who_was_dropped_and_why(tmp_path: Path) -> None:
    log = [entry(i, ["site-1"], {"site-2": "timed out after 60 s"} if i > 2 else {}) for i in range(1, 6)]
    folder = write_run(tmp_path / "run", result(status="degraded", reason="1 site was late", rounds_log=log))
    page = page_of(folder)
    assert "Degraded: 1 site was late" in page.words
    assert f"site-2 {ranges([3, 4, 5])} timed out after 60 s" in page.words
    heat = page.figures["plot-participation"]["data"][0]  # type: ignore[index]
    assert [row[2:] for row in heat["z"]][:2] == [[1, 1, 1], [2, 2, 2]]
    assert "timed out after 60 s" in heat["hovertext"][1][4]


def test_failed_run_without_rounds_has_a_report(tmp_path: Path) -> None:
    facts = result(
        status="failed",
        reason="no site replied",
        rounds=0,
        rounds_log=[],
        sites=[],
        server={"metrics": {}},
        timing={"total_s": None},
        peak_memory_mib=None,
    )
    events: list[Json] = [
        {"time": "2026-01-01T00:00:00Z", "round": 0, "kind": "run_started"},
        {"time": "2026-01-01T00:01:00Z", "round": 1, "kind": "site_failed", "site": "site-3", "reason": "no reply"},
    ]
    page = page_of(write_run(tmp_path / "run", facts, events=events))
    assert page.ids("section") == SECTIONS
    assert page.figures == {}
    assert "CheXNet finished no round of training." in page.words
    assert "Failed: no site replied" in page.words
    assert "no reply" in page.words and "2026-01-01T00:00:00Z" in page.words
    assert "fedmed simulate --resume run" in page.words


def test_undefined_values_are_dashes_that_say_why(tmp_path: Path) -> None:
    nothing: Json = {"value": None, "low": None, "high": None, "n": None}
    facts = result(
        seed=None,
        server={"metrics": {"auroc": nothing, "loss": None}},
        sites=[site("a", None, patients=None, images=None, rounds_joined=None), site("b", 0.8)],
        rounds_log=[entry(1, ["a", "b"], {}, None), entry(2, ["b"], {}, 0.7), entry(3, ["b"], {}, None)],
    )
    page = page_of(write_run(tmp_path / "run", facts))
    assert "held-out AUROC is undefined" in page.words
    titles = {attributes["title"] for tag, attributes in page.tags if tag == "abbr"}
    assert any("undefined: one class only" in (title or "") for title in titles)
    assert "None" not in page.words and "nan" not in page.words.lower()
    band = page.figures["plot-rounds"]["data"][0]  # type: ignore[index]
    assert band["x"] == [2, 2, None], "a band never bridges a gap"


def test_not_a_number_in_a_result_is_undefined(tmp_path: Path) -> None:
    facts = result(server={"metrics": {"auroc": {"value": float("nan"), "low": float("-inf"), "high": 1e400, "n": 3}}})
    page = page_of(write_run(tmp_path / "run", facts))
    assert "held-out AUROC is undefined" in page.words


def test_thousand_sites_stay_readable(tmp_path: Path) -> None:
    names = [f"site-{i:04}" for i in range(1000)]
    sites = [site(name, 0.5 + place / 2500) for place, name in enumerate(names)]
    log = [entry(i, names[100:], dict.fromkeys(names[:100], "late")) for i in range(1, 21)]
    folder = write_run(tmp_path / "run", result(status="degraded", sites=sites, rounds_log=log))
    page = page_of(folder)
    bars = page.figures["plot-sites"]["data"][0]  # type: ignore[index]
    assert bars["x"][0] == 0.5 and len(bars["x"]) == 50
    assert "the 50 worst of 1,000 sites" in page.words
    assert len(page.figures["plot-participation"]["data"][0]["z"]) == 50  # type: ignore[index]
    assert "And 50 more lines" in page.words
    assert page.text.count("site-0999") == 1, "the table lists every site"
    assert (folder / "report.html").stat().st_size < 6_000_000, "plotly.js is 4.8 MB of it"


def test_segmentation_shows_the_dice_of_every_case(tmp_path: Path) -> None:
    facts = result(
        task="segmentation", model="unet", server={"metrics": {"dice": estimate(0.83)}}, sites=[], rounds_log=[]
    )
    cases: Json = {"kind": "segmentation", "labels": ["lung"], "cases": {"lung": [0.7, None, 0.9], "heart": []}}
    page = page_of(write_run(tmp_path / "run", facts, cases))
    boxes = page.figures["plot-cases"]["data"]
    assert [box["y"] for box in boxes] == [[0.7, 0.9]]  # type: ignore[attr-defined]
    assert "held-out Dice 0.830" in page.words and "Dice of every case" in page.words
    go.Figure(page.figures["plot-cases"])


def test_long_roc_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    line = [i / 9999 for i in range(10_000)]
    curves = {"nodule": {"false_positive_rate": line, "true_positive_rate": line}}
    page = page_of(write_run(tmp_path / "run", result(), EVALUATION | {"curves": curves}))
    x = page.figures["plot-cases"]["data"][1]["x"]  # type: ignore[index]
    assert len(x) == 500 and x[0] == 0 and x[-1] == 1


def test_privacy_is_shown_and_never_rounded_down(tmp_path: Path) -> None:
    spent = {"unit": "patient", "delta": 1e-6, "epsilon": 3.101, "epsilon_total": 5.2, "events": [], "new-key": 1}
    page = page_of(write_run(tmp_path / "run", result(sites=[site("a", 0.8, privacy=spent), site("b", 0.8)])))
    assert "ε 3.11, in total ε 5.20, δ 1e-6, per patient" in page.words
    assert "no DP" in page.words


def test_test_noise_voids_epsilon(run: Path) -> None:
    facts = result(sites=[site("a", 0.8, privacy={"epsilon": 3.0, "delta": 1e-6, "unit": "patient"})])
    write_run(run, facts)
    (run / "run.toml").write_text('[privacy]\nmode = "dp-sgd"\nnoise = "insecure-test"\n')
    page = page_of(run)
    assert "No privacy is claimed." in page.words and "void: test noise" in page.words
    assert "ε 3.00" not in page.words


def test_primary_metric_is_the_one_that_the_run_asked_for(run: Path) -> None:
    (run / "run.toml").write_text('[evaluate]\nprimary = "auroc/nodule"\n')
    assert "held-out AUROC, nodule 0.930" in page_of(run).words


def test_unknown_keys_change_nothing(run: Path) -> None:
    extended = result(future={"a": [1]}, primary_site="x")
    before = page_of(run).text
    write_run(run, extended, EVALUATION | {"future": 1})
    assert page_of(run).text == before


@pytest.mark.parametrize("name", ["events.jsonl", "evaluation.json", "run.toml"])
def test_damaged_side_file_is_a_note_in_the_report(run: Path, name: str) -> None:
    (run / name).write_bytes(b'{"kind": "run_sta\xff')
    assert f"{name}" in " ".join(read_run(run).notes)
    assert name in page_of(run).words


def test_half_written_last_event_keeps_the_others(run: Path) -> None:
    (run / "events.jsonl").write_text('{"kind": "run_started", "time": "2026-01-01T00:00:00Z"}\n{"kind": "ev')
    facts = read_run(run)
    assert facts.started == "2026-01-01T00:00:00Z" and "1 line(s)" in facts.notes[0]


def test_events_of_logged_rounds_are_not_told_twice(tmp_path: Path) -> None:
    events: list[Json] = [
        {"kind": "site_failed", "round": 1, "site": "b", "reason": "late"},
        {"kind": "update_refused", "round": 2, "site": "b", "reason": "NaN"},
    ]
    folder = write_run(tmp_path / "run", result(rounds_log=[entry(1, ["a"], {"b": "late"})]), events=events)
    assert troubles(read_run(folder)) == [("b", "1", "late"), ("b", "2", "NaN")]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"schema": 2}',
        '{"schema": 1, "sites": 3}',
        '{"schema": 1, "rounds_log": [{}]}',
        "[" * 99999,
    ],
    ids=["missing", "empty", "half", "list", "no-schema", "newer", "sites", "round", "deep"],
)
def test_refuses_a_result_that_it_cannot_read_in_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError) as refusal:
        write_report(tmp_path)
    message = str(refusal.value)
    assert "result.json" in message and "\n" not in message and len(message) > 60
    assert not list(tmp_path.glob("*report*"))


def test_refuses_binary_result(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not JSON"):
        write_report(tmp_path)


def test_minimal_result_has_a_report(tmp_path: Path) -> None:
    assert page_of(write_run(tmp_path / "run", {"schema": 1})).ids("section") == SECTIONS


def test_full_disk_keeps_the_old_report(run: Path) -> None:
    write_report(run)
    old = (run / "report.html").read_bytes()
    (run / f".report.html.{os.getpid()}").symlink_to("/dev/full")  # where the new page is written first
    with pytest.raises(DataError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == old
    assert not list(run.glob(".report*"))


def test_report_is_written_again_in_place(run: Path) -> None:
    assert write_report(run) == write_report(run) == run / "report.html"
    assert not list(run.glob(".report*"))


def test_words() -> None:
    assert [number(v) for v in (0.0, 0.91, 123456.0)] == ["0.000", "0.910", "1.23e+05"]
    assert number(None) == "\N{EN DASH}" and number(-0.5) == "\N{MINUS SIGN}0.500"
    assert [duration(v) for v in (9.14, 59.99, 192.4, 7500)] == ["9.1 s", "1 min 0 s", "3 min 12 s", "2 h 5 min"]
    assert [epsilon(v) for v in (3.0, 3.001, 0.1 + 0.2, 6.31)] == ["3.00", "3.01", "0.30", "6.31"]
    assert ranges([5, 3, 4, 1, 9]) == "1, 3\N{EN DASH}5, 9"


def test_missing_interval_draws_no_whisker(tmp_path: Path) -> None:
    bare: Json = {"auroc": {"value": 0.8, "low": None, "high": None, "n": 16}}
    page = page_of(write_run(tmp_path / "run", result(sites=[site("a", 0.7), site("b", 0.8, metrics=bare)])))
    whiskers = page.figures["plot-sites"]["data"][1]  # type: ignore[index]
    assert whiskers["x"] == [pytest.approx(0.65), pytest.approx(0.75), None] and whiskers["y"] == [0, 0, None]


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[list[str]]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return [program, "--headless", "--no-sandbox", "--disable-gpu", *quiet, profile, "--virtual-time-budget=8000"]


@pytest.mark.browser
def test_browser_draws_every_plot(tmp_path: Path, chromium: list[str]) -> None:
    evil = "<script>document.title='owned'</script>"
    facts = result(sites=[site(evil, 0.8), site("b", None)], rounds_log=[entry(1, ["b"], {evil: evil})])
    report = write_report(write_run(tmp_path / "run", facts, EVALUATION))
    shown = subprocess.run(
        [*chromium, "--enable-logging=stderr", "--dump-dom", report.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    dom = shown.stdout
    for plot in ("plot-rounds", "plot-sites", "plot-cases", "plot-participation"):
        assert re.search(rf'id="{plot}"[^>]*>\s*<div class="plot-container', dom), f"{plot} was not drawn"
    assert dom.count('class="main-svg"') >= 4
    assert "<title>quickstart: fedmed report</title>" in dom
    assert "CONSOLE" not in shown.stderr, "the page logs no error and no blocked request"
