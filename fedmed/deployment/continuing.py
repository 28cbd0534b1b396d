"""Runs whose process is gone: the server submits them again, and they go on in their folders from their checkpoints."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from pathlib import Path

from flwr.supercore.control import ControlHttpClient

from fedmed.deployment.consortium import ServerFolder
from fedmed.deployment.control import FlowerRun, ServerAway, continue_run, control, runs, series_of, stop_run
from fedmed.deployment.coordinators import Entrance

AWAY_S = 600.0  # that whoever waits for a run waits for a server that is away
CONTINUE = 3  # times in a row that a run is continued by itself
KEEP = timedelta(days=7)
ROOM = 16 << 20  # bytes


def continue_lost(client: ControlHttpClient, folder: ServerFolder, earlier: Collection[int]) -> list[str]:
    """Submit runs again whose process is gone.

    Args:
        client: of the server.
        folder: of the server.
        earlier: numbers of the runs that an earlier SuperLink left.

    Returns:
        What was done, and what was not and why, in words.
    """
    said = []
    for run, tries in cut_off(runs(client), earlier):
        against = why_not(folder, run, tries)
        if against:
            said.append(f"run {run.number} was cut off and is not continued: {against}")
            continue
        new = continue_run(client, run)
        if not run.ended:
            stop_run(client, run.number)
        said.append(f"run {run.number} was cut off; run {new} goes on with it ({tries} of {CONTINUE} times)")
    return said


def why_not(folder: ServerFolder, run: FlowerRun, tries: int) -> str:
    """Why a run that was cut off is not continued now, and what to do; "" if it is.

    Args:
        folder: of the server.
        run: that was cut off.
        tries: how many times in a row.
    """
    resume = f"fedmed server resume {run.number} --server {shlex.quote(str(folder.root))}"
    if tries > CONTINUE:
        return f"it was {tries} times in a row; {resume}"
    if _last_sign(folder, run) < datetime.now(UTC) - KEEP:
        return f"its last sign of life is older than {KEEP.days} days; {resume}"
    return "" if has_room(folder, run) else "the disk has too little room; it goes on when there is more"


def under_way(every: Iterable[FlowerRun], began: datetime) -> frozenset[int]:
    """The runs that an earlier SuperLink started and left, by number.

    Asked once for each SuperLink, at its beginning: the clock may be set afterwards.

    Args:
        every: all runs.
        began: when the SuperLink was started.
    """
    return frozenset(run.number for run in every if not run.ended and run.started is not None and run.started < began)


def cut_off(every: Sequence[FlowerRun], earlier: Collection[int]) -> list[tuple[FlowerRun, int]]:
    """The runs that the server failed, and for the how many-th time in a row.

    Flower notices after a minute that a process is gone. That of a run which an earlier SuperLink started is gone.

    Args:
        every: all runs, the oldest first.
        earlier: numbers of the runs that an earlier SuperLink left.
    """
    series: dict[int, list[FlowerRun]] = {}
    for run in every:
        series.setdefault(run.series, []).append(run)
    gone = [tries for tries in series.values() if _gone(tries[-1], earlier)]
    return [(tries[-1], 1 + _continued(tries)) for tries in gone]


def _gone(run: FlowerRun, earlier: Collection[int]) -> bool:
    return run.lost or (not run.ended and run.number in earlier)


def _continued(tries: Sequence[FlowerRun]) -> int:
    """How many tries before the last one were cut off too, without one between that ended otherwise.

    One that Flower still counted as running was stopped once it was continued, and so ended after the next began.
    """
    newest_first = list(pairwise(tries))[::-1]
    cut = (run.lost or (run.finished or run.submitted) > after.submitted for run, after in newest_first)
    return len(list(takewhile(bool, cut)))


def finished(
    server: Entrance,
    number: int,
    say: Callable[[str], None],
    look: Callable[[int], None] = lambda series: None,
    every_s: float = 1.0,
) -> FlowerRun:
    """Wait until a run, or what continues it, has ended. A server that is started again meanwhile is waited for.

    Args:
        server: that the run is on.
        number: of the run.
        say: told once for each try that the server lost, which may go on much later, as when its disk is full.
        look: called with the run's series every now and then, and once after its end.
        every_s: between two looks.

    Raises:
        RunFailed: there is no such run, or the server refuses.
        ServerAway: it is away for ten minutes.
    """
    answered, told = time.monotonic(), 0
    while True:
        try:
            with control(server) as client:
                tries = series_of(client, number)
            answered = time.monotonic()
        except ServerAway:
            if time.monotonic() - answered > AWAY_S:
                raise
        else:
            run = tries[-1]
            look(run.series)
            if run.ended and not awaited(tries, datetime.now(UTC)):
                return run
            if run.ended and run.number != told:
                told = run.number
                say(f"run {told} was cut off; the server goes on with it when it can, as its log says")
        time.sleep(every_s)


def awaited(tries: Sequence[FlowerRun], now: datetime) -> bool:
    """Whether the server goes on with the last of these tries of one run by itself, at once or when it has room."""
    return any(
        count <= CONTINUE and (run.finished or run.submitted) > now - KEEP for run, count in cut_off(tries, earlier=())
    )


def has_room(folder: ServerFolder, run: FlowerRun) -> bool:
    """Whether the disks of the server have three times the room that a run's folder takes, and a little."""
    events = _events(folder, run)
    taken = sum(path.stat().st_size for path in events.parent.rglob("*") if path.is_file()) if events else 0
    free = min(shutil.disk_usage(path).free for path in (folder.flower, folder.runs) if path.exists())
    return free > 3 * taken + ROOM


def _last_sign(folder: ServerFolder, run: FlowerRun) -> datetime:
    """When a run last wrote an event; else when it was submitted."""
    path = _events(folder, run)
    return datetime.fromtimestamp(path.stat().st_mtime, UTC) if path is not None else run.submitted


def _events(folder: ServerFolder, run: FlowerRun) -> Path | None:
    return next(folder.runs.glob(f"*-{run.series}/events.jsonl"), None)
