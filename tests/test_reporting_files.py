from __future__ import annotations

from pathlib import Path

import pytest
from full_disks import full_disk
from report_files import EVALUATION, SECTIONS, Json, entry, page_of, result, write_run

from fedmed.errors import DataError
from fedmed.reporting import write_report
from fedmed.reporting.read import read_run
from fedmed.reporting.words import duration, epsilon, number, ranges, troubles


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", result(), EVALUATION)


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


@pytest.mark.parametrize("page", ["comparison.html", "sweep.html"])
def test_a_comparison_or_sweep_is_told_from_a_run_that_did_not_end(tmp_path: Path, page: str) -> None:
    (tmp_path / page).touch()
    with pytest.raises(DataError, match=f"is no run.*{page}"):
        write_report(tmp_path)


def test_refuses_binary_result(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not JSON"):
        write_report(tmp_path)


def test_minimal_result_has_a_report(tmp_path: Path) -> None:
    assert page_of(write_run(tmp_path / "run", {"schema": 1})).ids("section") == SECTIONS


def test_full_disk_keeps_the_old_report(run: Path) -> None:
    write_report(run)
    old = (run / "report.html").read_bytes()
    with full_disk(), pytest.raises(DataError, match="Make room"):
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
