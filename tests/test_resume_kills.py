"""A real process, killed at every write, fsync and rename that its server makes, resumes to the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmed.training.local_algorithms import KEEPS_STATE

pytestmark = pytest.mark.simulation
SCRIPT = Path(__file__).parent / "killed_run.py"


def killed_and_resumed(folder: Path, strategy: str, *points: str, timeout: float = 280) -> tuple[dict, list[dict]]:
    """What the unbroken run gave, and what each killed one gave after it was resumed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), strategy, *points],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, *others = map(json.loads, done.stdout.splitlines())
    return whole, others


def check(whole: dict, run: dict) -> None:
    assert run["killed"] == -9, run
    assert run["resumed"] == 0, run
    for key in ("files", "sites", "result", "log", "kept", "spool", "last_event", "times_add_up"):
        assert run[key] == whole[key], (run["at"], key)


def test_runs_killed_at_some_writes_fsyncs_and_renames_resume_to_the_same_bits(tmp_path):
    """Before the first checkpoint, inside the first and the second one, and at the very last line of the events."""
    points = (
        "write:1",
        "write:6",
        "fsync:2",
        "rename:1",
        "rename:2",
        "rename:3",
        "write:15",
        "fsync:12",
        "rename:8",
        "write:38",
    )
    whole, runs = killed_and_resumed(tmp_path, "fedavgm", *points)
    assert whole["times_add_up"]
    assert [run["at"] for run in runs] == list(points)
    for run in runs:
        check(whole, run)


def test_what_sites_keep_is_the_same_after_a_kill_too(tmp_path):
    """In the first, second and third round, of which a site that took part has a file."""
    points = ("rename:2", "fsync:5", "rename:6", "write:24", "rename:10")
    whole, runs = killed_and_resumed(tmp_path, "scaffold", *points)
    assert len(whole["sites"]) >= 4
    assert [run["at"] for run in runs] == list(points)
    for run in runs:
        check(whole, run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "scaffold", "ditto", "fedbn"])
def test_runs_killed_at_any_write_fsync_or_rename_resume_to_the_same_bits(tmp_path, strategy):
    whole, runs = killed_and_resumed(tmp_path, strategy, "all", timeout=1700)
    assert bool(whole["sites"]) == (strategy in KEEPS_STATE)
    assert len(runs) == sum(whole["calls"].values()) > 60
    for run in runs:
        check(whole, run)
