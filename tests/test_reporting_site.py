"""A site's own page, in a run's folder and at a hospital."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_consortium import command
from report_files import PICTURE, Json, Page, estimate
from test_reporting_cases import write_findings

from fedmed.errors import DataError
from fedmed.reporting import write_report, write_site_reports


def gains(**changes: object) -> Json:
    arms = [
        {"arm": "local", "kind": "local", **estimate(0.8), "gain_over_local": None},
        {"arm": "fedavg", "kind": "federated", **estimate(0.86)}
        | {"gain_over_local": {"value": 0.06, "low": 0.01, "high": 0.11}},
    ]
    return {"schema": 1, "name": "quickstart", "site": "site-1", "primary": "auroc", "arms": arms} | changes


def test_a_site_reads_exact_counts_reasons_and_its_own_cases(tmp_path: Path) -> None:
    write_findings(tmp_path, "site-1")
    page = Page(write_report(tmp_path / "sites" / "site-1"))
    assert "CheXNet reaches AUROC 0.900 (95 % interval 0.860–0.940) at 16 held-out patients of this site." in page.words
    assert "no weight was trained on here" in page.words and "Under feddg-ga" in page.words
    assert "3: truncated file (3)" in page.words and "Other (CR) 4" in page.words
    assert "effusion 4 196 2.0 % (4)" in page.words
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["src"] == PICTURE and "nodule: present, predicted 0.10" in str(image["alt"])


def test_the_command_writes_a_sites_page_and_no_model_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_findings(tmp_path, "site-1")
    folder = tmp_path / "sites" / "site-1"
    command("report", folder)
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert not (folder / "MODEL_CARD.md").exists()


def test_the_page_is_for_its_owner_alone_and_holds_no_script(tmp_path: Path) -> None:
    write_findings(tmp_path, "site-1", site="<script>alert(1)</script>")
    report = write_report(tmp_path / "sites" / "site-1")
    assert report.stat().st_mode & 0o077 == 0
    page = Page(report)
    assert "script" not in [tag for tag, _ in page.tags] and "<script>alert(1)</script>" in page.text
    assert report.stat().st_size < 100_000, "a thousand virtual hospitals have a thousand pages"
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in str(policy) and "script-src" not in str(policy)


def test_a_comparison_says_what_the_sites_patients_gained(tmp_path: Path) -> None:
    write_findings(tmp_path, "site-1")
    (tmp_path / "sites" / "site-1" / "comparison.json").write_text(json.dumps(gains()))
    page = Page(write_report(tmp_path / "sites" / "site-1"))
    assert "trained here alone 0.800" in page.words and "fedavg 0.860 0.830–0.890 +0.060 0.010–0.110" in page.words


def test_a_comparison_alone_has_a_page_without_the_sites_data(tmp_path: Path) -> None:
    folder = tmp_path / "sites" / "site-1"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(gains()))
    (report,) = write_site_reports(tmp_path)
    page = Page(report)
    assert page.ids("section") == ["gain"] and "+0.060" in page.words


def test_without_a_comparison_the_page_says_how_to_get_one(tmp_path: Path) -> None:
    write_findings(tmp_path, "site-1")
    assert "fedmed compare" in Page(write_report(tmp_path / "sites" / "site-1")).words


def test_refuses_findings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "findings.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        write_report(tmp_path)
