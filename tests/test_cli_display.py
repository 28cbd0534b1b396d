"""What a terminal shows of a run."""

from __future__ import annotations

import io

import pytest
from report_files import estimate
from rich.console import Console
from rich.progress import Progress, TextColumn
from test_reporting_live import EVENTS, event

import fedmed as package
from fedmed.cli.display import Lines, Live, Seen, preamble, together
from fedmed.federated.identity import package_hash


def test_a_plain_line_says_loss_metric_time_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(3, "auroc")
    for each in EVENTS:
        lines(each)
    assert capsys.readouterr().err.splitlines() == [
        "b dropped: no answer before the round's deadline",
        "round 1/3  1 site  loss 0.700  auroc 0.810 (0.780-0.840)  2.0 s  4 s left",
    ]


def test_the_last_round_has_nothing_left() -> None:
    seen = Seen(1, "auroc")
    for each in EVENTS[:6]:
        seen(each)
    assert seen.facts() == "loss 0.700  auroc 0.810 (0.780-0.840)  2.0 s"


def test_time_left_follows_the_latest_rounds() -> None:
    seen = Seen(100, "auroc")
    for round_, seconds in enumerate([500.0, 60.0, 60.0, 60.0, 60.0, 60.0], start=1):
        seen(event("round_finished", round_, seconds=seconds))
    assert seen.facts() == "60.0 s  94 min left"


def test_the_largest_epsilon_of_a_site_is_shown_and_never_rounded_down() -> None:
    seen = Seen(2, "auroc")
    for site, epsilon, shown in (("a", 1.1, "1.10"), ("b", 2.301, "2.31"), ("c", 1.9, "2.31")):
        seen(event("update_received", 1, site=site, loss=None, epsilon=epsilon))
        assert seen.facts() == f"ε ≤ {shown}"


def test_an_undefined_metric_and_a_missing_loss_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(1, "auroc")
    undefined = {"auroc": estimate(None)}
    for each in (
        event("round_started", 1, sites=["a"]),
        event("update_received", 1, site="a", loss=None),
        event("evaluated", 1, metrics=undefined, selection=None),
        event("round_finished", 1, seconds=1.0),
    ):
        lines(each)
    assert capsys.readouterr().err == "round 1/1  1 site  auroc null (one class, or too few patients)  1.0 s\n"


def test_the_live_display_shows_rounds_sites_and_names_as_they_are() -> None:
    file = io.StringIO()
    console = Console(file=file, width=140, force_terminal=True, legacy_windows=False, color_system=None)
    columns = TextColumn("{task.description} {task.completed}/{task.total} {task.fields[facts]}", markup=False)
    with Progress(columns, console=console, auto_refresh=False) as progress:
        live = Live(progress, 3, "auroc")
        for each in EVENTS[:6]:
            live(each)
        live(event("site_failed", 1, site="[red]c", reason="[/] late"))
        progress.refresh()
    shown = file.getvalue()
    assert "[red]c dropped: [/] late" in shown
    assert "rounds 1/3 loss 0.700  auroc 0.810 (0.780-0.840)  2.0 s  4 s left" in shown


def test_initial_decoding_is_shown_site_by_site() -> None:
    with Progress(console=Console(file=io.StringIO()), auto_refresh=False) as progress:
        live = Live(progress, 3, "auroc")
        live({"kind": "greeted", "site": "a", "done": 1, "all": 4})
        task = progress.tasks[1]
        assert (task.description, task.completed, task.total) == ("greeting", 1, 4)


def test_unreadable_images_and_late_sites_stand_before_the_first_round() -> None:
    facts = {"unreadable": {"a": {"images": 2, "reasons": "truncated file: 2"}}, "joined_late": ["b"]}
    assert preamble(event("round_started", 3, sites=["a"], **facts)) == [
        "b joins in round 3",
        "a: 2 images left out, unreadable (fewer than data.max-unreadable): truncated file: 2",
    ]
    few = {"unreadable": {"a": {"images": None, "reasons": "truncated file: < 10"}}}
    assert preamble(event("round_started", 1, **few)) == [
        "a: images left out, unreadable (fewer than data.max-unreadable): truncated file: < 10",
    ]


def test_several_watchers_are_told_of_every_event() -> None:
    first: list[object] = []
    second: list[object] = []
    watch = together(first.append, second.append)
    for each in EVENTS:
        watch(each)
    assert first == second == EVENTS


def test_the_version_says_which_code_a_site_and_its_server_compare(fedmed) -> None:
    done = fedmed("--version")
    assert (done.returncode, done.stdout) == (0, f"fedmed {package.__version__}, code {package_hash()[:12]}\n")
