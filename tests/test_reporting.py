from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go  # type: ignore[import-untyped]
import pytest
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
from report_files import EVALUATION, PLOTS, SECTIONS, Json, entry, estimate, page_of, result, site, write_run

from fedmed.reporting.words import ranges


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", result(), EVALUATION)


def test_report_holds_every_section_in_order(run: Path) -> None:
    page = page_of(run)
    assert page.ids("section") == SECTIONS
    assert list(page.figures) == PLOTS


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
        assert tag not in {"link", "iframe", "base", "object", "embed", "form", "a"}
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
    assert len(plots) == len(PLOTS)
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
    assert [tag for tag, _ in page.tags].count("script") == len(page.figures) + 2
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
    assert page.text.count("site-0999") == 2, "both tables list every site"
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
    spent["accountant_total"] = "rdp"
    page = page_of(write_run(tmp_path / "run", result(sites=[site("a", 0.8, privacy=spent), site("b", 0.8)])))
    assert "ε 3.11, in total ε 5.20 by rdp, δ 1e-6, per patient" in page.words
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


def test_missing_interval_draws_no_whisker(tmp_path: Path) -> None:
    bare: Json = {"auroc": {"value": 0.8, "low": None, "high": None, "n": 16}}
    page = page_of(write_run(tmp_path / "run", result(sites=[site("a", 0.7), site("b", 0.8, metrics=bare)])))
    whiskers = page.figures["plot-sites"]["data"][1]  # type: ignore[index]
    assert whiskers["x"] == [pytest.approx(0.65), pytest.approx(0.75), None] and whiskers["y"] == [0, 0, None]
