"""What long work shows: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Event = Mapping[str, Any]


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for countable work, called with (done, all); None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with _progress() as progress:
        task = progress.add_task(title, total=None, facts="")
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def watching(rounds: int, primary: str, *, quiet: bool = False) -> Iterator[Callable[[Event], None]]:
    """Show a federation's events as they come."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _progress() as progress:
            yield Live(progress, rounds, primary)
    else:
        yield Lines(rounds, primary)


class Live:
    """Two bars: rounds with loss and metric, and the sites of the present round."""

    def __init__(self, progress: Progress, rounds: int, primary: str) -> None:
        """Add the bars to a running display."""
        self._progress, self._primary = progress, primary
        self._rounds = progress.add_task("rounds", total=rounds, facts="greeting the sites")
        self._sites = progress.add_task("sites", total=None, facts="")
        self._losses: list[float] = []

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind, progress = event["kind"], self._progress
        if kind == "greeted":
            facts = f"{event['site']}: ready"
            progress.update(
                self._sites, total=event["all"], completed=event["done"], description="greeting", facts=facts
            )
        elif kind == "round_started":
            self._losses = []
            for line in preamble(event):
                progress.console.print(line, highlight=False)
            progress.reset(self._sites, total=len(event["sites"]), description=f"round {event['round']}", facts="")
        elif kind == "update_received":
            self._losses += [event["loss"]] if event["loss"] is not None else []
            progress.update(self._sites, advance=1, facts=f"{event['site']}: loss {_number(event['loss'])}")
        elif kind in ("site_failed", "update_refused"):
            progress.update(self._sites, advance=1)
            progress.console.print(f"[yellow]{event['site']} dropped:[/] {event['reason']}", highlight=False)
        elif kind == "evaluated":
            progress.update(self._rounds, facts=score(event, self._primary) + _loss(self._losses))
        elif kind == "round_finished":
            progress.update(self._rounds, completed=event["round"])
            if not progress.tasks[0].fields["facts"] or "greeting" in progress.tasks[0].fields["facts"]:
                progress.update(self._rounds, facts=_loss(self._losses))


class Lines:
    """One line a round."""

    def __init__(self, rounds: int, primary: str) -> None:
        """Nothing is printed before the first round ends."""
        self._rounds, self._primary = rounds, primary
        self._losses: list[float] = []
        self._joined, self._score = 0, ""

    def __call__(self, event: Event) -> None:
        """Print a line when a round ends or a site drops out."""
        kind = event["kind"]
        if kind == "round_started":
            self._losses, self._joined, self._score = [], 0, ""
            for line in preamble(event):
                self._print(line)
        elif kind == "update_received":
            self._losses += [event["loss"]] if event["loss"] is not None else []
            self._joined += 1
        elif kind in ("site_failed", "update_refused"):
            self._print(f"{event['site']} dropped: {event['reason']}")
        elif kind == "evaluated":
            self._score = score(event, self._primary)
        elif kind == "round_finished":
            facts = f"{self._joined} sites{_loss(self._losses)}  {self._score}".rstrip()
            self._print(f"round {event['round']}/{self._rounds}  {facts}  {event['seconds']:.1f} s")

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def preamble(event: Event) -> list[str]:
    """What the file of weights gave, who came late, and one line for every site with images that could not be read."""
    lines = [f"weights: {event['weights']}"] if "weights" in event else []
    lines += [f"{site} joins in round {event['round']}" for site in event.get("joined_late", ())]
    return lines + [
        f"{site}: {facts['images']} image{'s' if facts['images'] > 1 else ''} left out, unreadable "
        f"(fewer than data.max-unreadable): {facts['reasons']}"
        for site, facts in event.get("unreadable", {}).items()
    ]


def score(event: Event, primary: str) -> str:
    """The primary metric of an evaluation with its interval."""
    return f"{primary} {interval(event['metrics'].get(primary))}"


def interval(metric: Mapping[str, Any] | None) -> str:
    """A metric as text: value and 95 % interval; without both classes, or without cases, it is not defined."""
    if metric is None or metric["value"] is None:
        return "null (one class)"
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"


def console() -> Console:
    """Where tables go."""
    return Console(stderr=False, highlight=False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=Console(stderr=True),
    )


def _loss(losses: list[float]) -> str:
    return f"  loss {_number(sum(losses) / len(losses))}" if losses else ""


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
