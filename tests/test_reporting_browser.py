"""Reports in a real browser: every plot is drawn, nothing is asked of the network, and no error is logged."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from report_files import EVALUATION, PICTURE, PLOTS, entry, estimate, result, site, write_run
from test_reporting_cases import write_findings
from test_reporting_live import EVENTS, event, tell

from fedmed.reporting import write_report
from fedmed.reporting.live import live_server

pytestmark = pytest.mark.browser
EVIL = "<script>document.title='owned'</script>"


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return [program, "--headless", "--no-sandbox", "--disable-gpu", *quiet, profile, "--virtual-time-budget=5000"]


def opened(chromium: list[str], address: str) -> str:
    """The page as the browser has it after its scripts ran."""
    command = [*chromium, "--enable-logging=stderr", "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr, "the page logs no error and no blocked request"
    return shown.stdout


def drawn(dom: str) -> list[str]:
    return [plot for plot in PLOTS if re.search(rf'id="{plot}"[^>]*>\s*<div class="plot-container', dom)]


def test_every_plot_of_a_classification_is_drawn(tmp_path: Path, chromium: list[str]) -> None:
    metrics = {"auroc": estimate(0.8), "auroc/nodule": estimate(0.9), "auroc/effusion": estimate(0.7)}
    sites = [site(EVIL, 0.8, metrics=metrics), site("b", None)]
    facts = result(sites=sites, rounds_log=[entry(1, ["b"], {EVIL: EVIL})])
    run = write_run(tmp_path / "run", facts, EVALUATION)
    write_findings(run, "b")
    dom = opened(chromium, write_report(run).as_uri())
    assert drawn(dom) == PLOTS
    assert dom.count('class="main-svg"') >= len(PLOTS)
    assert "<title>quickstart: fedmed report</title>" in dom


def test_every_plot_and_picture_of_a_segmentation_is_drawn(tmp_path: Path, chromium: list[str]) -> None:
    facts = result(task="segmentation", server={"metrics": {"dice": estimate(0.83)}}, sites=[site("a", 0.8)])
    evaluation = {
        "kind": "segmentation",
        "labels": ["lung"],
        "cases": {"lung": [0.7, 0.9, 0.95]},
        "hd95": {"lung": [3.0, 7.5]},
        "pictures": [{"kind": "worst", "score": 0.4, "outcome": "", "image": PICTURE}],
    }
    dom = opened(chromium, write_report(write_run(tmp_path / "run", facts, evaluation)).as_uri())
    assert re.search(r'id="plot-hd95"[^>]*>\s*<div class="plot-container', dom) and "plot-cases" in drawn(dom)
    assert f'<img src="{PICTURE}"' in dom


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_page_is_no_wider_than_a_phone_and_can_be_printed(task: str, tmp_path: Path, chromium: list[str]) -> None:
    name, metrics = "hospital_" * 8, {f"auroc/finding_{number}": estimate(0.8) for number in range(14)}
    sites, log = [site(name, 0.8, metrics=metrics), site("b", None)], [entry(1, ["b"], {name: "reason " * 20})]
    facts = result(task=task, sites=sites, rounds_log=log)
    if task == "segmentation":
        facts["server"] = {"metrics": {"dice": estimate(0.83)}}
        evaluation = {"kind": task, "labels": ["lung"], "cases": {"lung": [0.7, 0.9]}, "hd95": {"lung": [3.0, 7.5]}}
    else:
        evaluation = EVALUATION
    page = write_report(write_run(tmp_path / "run", facts, evaluation))
    within = tmp_path / "phone.html"  # a window of the browser itself is 500 wide at least
    within.write_text(
        f'<iframe width=390 height=844 frameborder=0 srcdoc="{html.escape(page.read_text())}"></iframe><script>'
        "setTimeout(() => document.title = frames[0].document.documentElement.scrollWidth, 3000)</script>"
    )
    title = re.search(r"<title>(\d+)</title>", opened(chromium, within.as_uri()))
    assert title and int(title[1]) <= 390
    printed = tmp_path / "page.pdf"
    subprocess.run([*chromium, f"--print-to-pdf={printed}", page.as_uri()], capture_output=True, check=True)
    assert 1 <= printed.read_bytes().count(b"/Type /Page\n") <= 10


def test_a_site_page_opens_without_a_script(tmp_path: Path, chromium: list[str]) -> None:
    write_findings(tmp_path, "site-1")
    dom = opened(chromium, write_report(tmp_path / "sites" / "site-1").as_uri())
    assert "16 held-out patients of this site" in dom and "<script" not in dom


def test_the_live_page_follows_a_run(tmp_path: Path, chromium: list[str]) -> None:
    (tmp_path / "run.toml").write_text('name = "quickstart"\n[train]\nrounds = 3\n')
    tell(tmp_path, *EVENTS, event("update_received", 2, site=EVIL, images=4, loss=0.5, epsilon=1.234))
    with live_server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            dom = opened(chromium, f"http://127.0.0.1:{server.server_port}/")
        finally:
            server.shutdown()
            thread.join()
    assert "<title>2/3 running</title>" in dom, "the page tells the round, and no name became a script"
    assert re.search(r'id="metric">0.810<', dom) and re.search(r'id="epsilon">1.24<', dom)
    assert re.search(r'id="plot-live"[^>]*>\s*<div class="plot-container', dom)
    assert "images&lt;10" in dom and "images=4" not in dom
