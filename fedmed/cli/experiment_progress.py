"""Progress over all runs of an experiment, without a thread: runs are forked while it is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmed.experiments.running import Standing

LINE_EVERY_S = 10.0  # where there is no terminal


@contextmanager
def grid_progress(*, quiet: bool) -> Iterator[Callable[[Standing], None]]:
    """Show how far a grid of runs is: two bars on a terminal, a line now and then elsewhere."""
    if quiet:
        yield lambda standing: None
    elif sys.stderr.isatty():
        with bars() as watch:
            yield watch
    else:
        yield Lines()


@contextmanager
def bars() -> Iterator[Callable[[Standing], None]]:
    """Bars of runs and rounds that are drawn only when told to."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # auto_refresh would start a thread, and a fork with threads may hang
    progress = Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=Console(stderr=True),
        auto_refresh=False,
    )
    with progress:
        runs = progress.add_task("runs", total=None, facts="")
        rounds = progress.add_task("rounds", total=None, facts="")

        def watch(standing: Standing) -> None:
            reused = f"{standing.reused} reused" if standing.reused else ""
            progress.update(runs, completed=standing.done, total=standing.runs, facts=reused)
            progress.update(
                rounds, completed=standing.rounds_done, total=standing.rounds, facts=", ".join(standing.running)[:60]
            )
            progress.refresh()

        yield watch


class Lines:
    """A line when runs have ended, not more often than every few seconds."""

    def __init__(self) -> None:
        """Nothing is printed before something has ended."""
        self._said, self._at = -1, 0.0

    def __call__(self, standing: Standing) -> None:
        """Print a line if there is news."""
        last = standing.done == standing.runs
        if standing.done == self._said or not (last or time.monotonic() - self._at > LINE_EVERY_S):
            return
        self._said, self._at = standing.done, time.monotonic()
        reused = f", {standing.reused} of them reused" if standing.reused else ""
        print(f"{standing.done}/{standing.runs} runs{reused}", file=sys.stderr, flush=True)
