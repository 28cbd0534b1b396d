"""Curves, cases, pictures and counts in the report of a run."""

from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go  # type: ignore[import-untyped]
import pytest
from report_files import EVALUATION, PICTURE, Json, estimate, page_of, result, site, write_run

from fedmed.reporting import write_model_card
from fedmed.reporting.facts import Counts
from fedmed.reporting.words import prevalence, site_count


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", result(), EVALUATION)


def many_labels(count: int) -> Json:
    curve = {"false_positive_rate": [0, 0.2, 1], "true_positive_rate": [0, 0.8, 1]}
    band = {"at": [0, 0.5, 1], "low": [0, 0.7, 1], "high": [0.5, 1, 1]}
    return {"kind": "classification", "curves": {f"label-{i}": curve | band for i in range(count)}}


def write_findings(run: Path, name: str, **changes: object) -> None:
    folder = run / "sites" / name
    folder.mkdir(parents=True)
    found: Json = {
        "schema": 1,
        "site": name,
        "run": "quickstart",
        "model": "chexnet",
        "task": "classification",
        "primary": "auroc",
        "round": 5,
        "patients": 80,
        "images": 200,
        "held_out": {"patients": 16, "items": 41},
        "unreadable": {"images": 3, "reasons": {"truncated file": 3}},
        "scanners": [{"scanner": "Acme X1 (DX)", "images": 196}, {"scanner": "Other (CR)", "images": 4}],
        "prevalence": {"nodule": {"positives": 50, "negatives": 150}, "effusion": {"positives": 4, "negatives": 196}},
        "metrics": {"auroc": estimate(0.9, 0.04, 16), "auroc/nodule": estimate(0.9, 0.04, 16)},
        "pictures": [{"kind": "worst", "score": 0.1, "outcome": "nodule: present, predicted 0.10", "image": PICTURE}],
    }
    (folder / "findings.json").write_text(json.dumps(found | changes))


def test_curves_have_their_bands(run: Path) -> None:
    page = page_of(run)
    for plot, traces in (("plot-cases", 3), ("plot-precision-recall", 2), ("plot-calibration", 5)):
        data = page.figures[plot]["data"]
        assert len(data) == traces, plot  # type: ignore[arg-type]
        band = next(trace for trace in data if trace.get("fill") == "toself")  # type: ignore[attr-defined]
        assert band["visible"] is True and len(band["x"]) == len(band["y"]) == 6
        go.Figure(page.figures[plot])


def test_bands_of_many_labels_come_one_at_a_time(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", result(), many_labels(14)))
    figure = page.figures["plot-cases"]
    bands = [trace for trace in figure["data"] if trace.get("fill")]  # type: ignore[attr-defined]
    assert len(bands) == 14 and not any(band["visible"] for band in bands)
    (menu,) = figure["layout"]["updatemenus"]  # type: ignore[index]
    assert len(menu["buttons"]) == 15
    for place, button in enumerate(menu["buttons"][1:]):
        shown = button["args"][0]["visible"]
        assert len(shown) == len(figure["data"]) and sum(shown) == 3  # type: ignore[arg-type]
        assert shown[1 + 2 * place : 3 + 2 * place] == [True, True]
    go.Figure(figure)


def test_the_table_at_one_threshold_says_how_it_was_chosen(run: Path) -> None:
    words = page_of(run).words
    assert "chosen on the server's selection patients" in words
    assert "nodule 0.310 80 10 25 175 0.889 0.859–0.919 0.875 0.845–0.905" in words


def test_a_site_is_told_where_its_network_is_weak_for_a_label(run: Path) -> None:
    sites = [
        site(
            name, 0.8, metrics={"auroc": estimate(0.8), "auroc/nodule": estimate(0.9), "auroc/effusion": estimate(0.7)}
        )
        for name in ("a", "b")
    ]
    write_run(run, result(sites=sites), EVALUATION)
    cells = page_of(run).figures["plot-labels"]["data"][0]  # type: ignore[index]
    assert cells["z"] == [[0.93, None], [0.9, 0.7], [0.9, 0.7]]
    assert cells["text"][1] == ["0.900", "0.700"]


def test_bounds_of_histograms_stand_beside_the_sites_metrics(tmp_path: Path) -> None:
    bounded = {"auroc": estimate(0.8) | {"bound": 0.0042}}
    page = page_of(write_run(tmp_path / "run", result(sites=[site("a", 0.8, metrics=bounded), site("b", 0.7)])))
    assert "± 0.004" in page.words and "Bound" in page.words
    assert "Bound" not in page_of(write_run(tmp_path / "other", result())).words


def test_counts_prevalence_and_scanners_of_sites_on_this_machine(run: Path) -> None:
    write_findings(run, "site-1")
    words = page_of(run).words
    assert "site-1 80 200 < 10 Acme X1 (DX) 196, Other (CR) < 10" in words
    assert "site-1 25.0 % (50) < 10" in words
    assert "server, test part 120 300" in words and "server, test part 31.0 % (90) 0.0 % (0)" in words


def test_small_counts_of_a_site_are_not_told(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", result(sites=[site("tiny", 0.8, patients=4, images=9)])))
    assert "tiny < 10 < 10" in page.words
    assert [site_count(n) for n in (None, 0, 9, 10, 1234)] == ["–", "0", "< 10", "10", "1,234"]
    assert prevalence(Counts(positives=9, negatives=91)) == "< 10"
    assert prevalence(Counts(positives=91, negatives=9)) == "all but < 10"
    assert prevalence(Counts(positives=9, negatives=91), own=True) == "9.0 % (9)"
    assert prevalence(Counts(positives=0, negatives=0)) == prevalence(None) == "–"


def test_the_small_held_out_count_of_a_site_is_not_under_the_pointer_either(tmp_path: Path) -> None:
    few = {"auroc": estimate(0.8, patients=7)}
    page = page_of(write_run(tmp_path / "run", result(sites=[site("tiny", 0.8, metrics=few)])))
    (text,) = page.figures["plot-sites"]["data"][0]["hovertext"]  # type: ignore[index]
    assert "< 10 patients" in text and "7 patients" not in text


def test_small_counts_of_a_site_are_not_in_the_model_card_either(tmp_path: Path) -> None:
    few = site("tiny", 0.8, patients=4, images=9, metrics={"auroc": estimate(0.8, patients=3)})
    card = write_model_card(write_run(tmp_path / "run", result(sites=[few]))).read_text()
    assert "| tiny | < 10 | < 10 | 5 |" in card and "(0.770–0.830) | < 10 |" in card
    assert "(0.880–0.940) | 120 |" in card, "the server's own count"


def test_a_sites_pictures_never_enter_the_report_of_the_run(run: Path) -> None:
    write_findings(run, "site-1")
    assert page_of(run).text and PICTURE not in (run / "report.html").read_text()
    assert PICTURE in (run / "sites" / "site-1" / "report.html").read_text()


def test_segmentation_shows_distances_and_the_servers_worst_and_best_cases(tmp_path: Path) -> None:
    facts = result(task="segmentation", model="unet", server={"metrics": {"dice": estimate(0.83)}}, sites=[])
    pictures = [
        {"kind": "worst", "score": 0.41, "outcome": "", "image": PICTURE},
        {"kind": "best", "score": 0.97, "outcome": "", "image": PICTURE},
        {"kind": "best", "score": 0.96, "outcome": "", "image": "https://evil.example/x.png"},
    ]
    cases: Json = {"kind": "segmentation", "labels": ["lung"], "cases": {"lung": [0.7, 0.9]}, "pictures": pictures}
    page = page_of(write_run(tmp_path / "run", facts, cases | {"hd95": {"lung": [3.5, 12.0, None]}}))
    assert page.figures["plot-hd95"]["data"][0]["y"] == [3.5, 12.0]  # type: ignore[index]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["src"] for image in images] == [PICTURE, PICTURE], "what is no data URI is left out"
    assert "Worst case, Dice 0.410" in str(images[0]["alt"])
    assert "patients of the server's own set" in page.words


def test_how_it_was_trained_names_no_file(run: Path) -> None:
    (run / "run.toml").write_text(
        '[data]\nsites = ["/secret/a/manifest.csv"]\nserver = "/secret/s.csv"\npreset = "cxr"\n'
        '[model]\nnorm = "group"\nweights = "/secret/w.pt"\n[train]\nlearning-rate = 0.001\n'
        'augment = ["flip", "noise"]\n'
    )
    words = page_of(run).words
    assert "train.learning-rate 0.001" in words and "train.augment flip, noise" in words
    assert "secret" not in (run / "report.html").read_text()
