"""What long work shows: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedmed.types import Event, rounded_up

if TYPE_CHECKING:
    from fedmed.config import RunConfig

RECENT = 5  # rounds whose mean time says how long the others take


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A bar for countable work, called with (done, all), all = None: not known yet. Without a terminal, None."""
    if not sys.stderr.isatty():
        yield None
        return
    with _progress(TimeRemainingColumn()) as progress:
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


def together(*watchers: Callable[[Event], None]) -> Callable[[Event], None]:
    """One function that tells several of an event."""

    def watch(event: Event) -> None:
        for each in watchers:
            each(event)

    return watch


class Live:
    """Two bars: rounds with loss, metric, ε and the time left, and the sites of the present round."""

    def __init__(self, progress: Progress, rounds: int, primary: str) -> None:
        """Add the bars to a running display."""
        self._progress, self._seen = progress, Seen(rounds, primary)
        self._rounds = progress.add_task("rounds", total=rounds, facts="greeting the sites")
        self._sites = progress.add_task("sites", total=None, facts="")

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind, progress, seen = event["kind"], self._progress, self._seen
        seen(event)
        if kind == "greeted":
            facts = f"{event['site']}: ready"
            progress.update(
                self._sites, total=event["all"], completed=event["done"], description="greeting", facts=facts
            )
        elif kind == "waiting":
            progress.console.print(waiting(event), style="yellow", markup=False)
        elif kind == "round_started":
            for line in preamble(event):
                progress.console.print(line, highlight=False, markup=False)
            progress.reset(self._sites, total=len(event["sites"]), description=f"round {event['round']}", facts="")
            progress.update(self._rounds, completed=event["round"] - 1, facts=seen.facts())
        elif kind == "update_received":
            for line in seen.warnings(event):
                progress.console.print(line, style="yellow", markup=False)
            progress.update(self._sites, advance=1, facts=f"{event['site']}: loss {_number(event['loss'])}")
        elif kind in ("site_failed", "update_refused"):
            progress.update(self._sites, advance=1)
            progress.console.print(f"{event['site']} dropped: {event['reason']}", style="yellow", markup=False)
        elif kind == "evaluated":
            progress.update(self._rounds, facts=seen.facts())
        elif kind == "round_finished":
            progress.update(self._rounds, completed=event["round"], facts=seen.facts())
            if event["round"] == seen.rounds:
                progress.update(self._sites, description="sites", total=None, facts="evaluate the kept network")


class Lines:
    """One line a round."""

    def __init__(self, rounds: int, primary: str) -> None:
        """Nothing is printed before the first round ends."""
        self._seen = Seen(rounds, primary)

    def __call__(self, event: Event) -> None:
        """Print a line when a round ends or a site drops out."""
        kind, seen = event["kind"], self._seen
        seen(event)
        if kind == "waiting":
            self._print(waiting(event))
        elif kind == "round_started":
            for line in preamble(event):
                self._print(line)
        elif kind == "update_received":
            for line in seen.warnings(event):
                self._print(line)
        elif kind in ("site_failed", "update_refused"):
            self._print(f"{event['site']} dropped: {event['reason']}")
        elif kind == "round_finished":
            sites = f"{seen.joined} site{'' if seen.joined == 1 else 's'}"
            self._print(f"round {event['round']}/{seen.rounds}  {sites}  {seen.facts()}".rstrip())

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Seen:
    """What the events so far amount to: the present round's loss, metric and ε, and how long rounds take."""

    def __init__(self, rounds: int, primary: str) -> None:
        """Nothing was seen yet."""
        self.rounds, self._primary = rounds, primary
        self.joined = 0
        self._losses: list[float] = []
        self._score = ""
        self._epsilon: float | None = None
        self._seconds: list[float] = []
        self._left = rounds
        self._warned: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Take one event in."""
        kind = event["kind"]
        if kind == "round_started":
            self._losses, self.joined, self._score = [], 0, ""
        elif kind == "update_received":
            self._losses += [event["loss"]] if event["loss"] is not None else []
            self.joined += 1
            if isinstance(spent := event.get("epsilon"), int | float):
                self._epsilon = max(self._epsilon or 0.0, float(spent))
        elif kind == "evaluated":
            self._score = score(event, self._primary)
        elif kind == "round_finished":
            self._seconds.append(event["seconds"])
            self._epsilon = event.get("epsilon", self._epsilon)  # of noise at the server
            self._left = self.rounds - event["round"]

    def warnings(self, event: Event) -> list[str]:
        """What a site warns of with its update, said once a run."""
        line = f"{event['site']}: warning: {event['warning']}" if "warning" in event else ""
        if not line or line in self._warned:
            return []
        self._warned.add(line)
        return [line]

    def facts(self) -> str:
        """`loss 0.412  auroc 0.871 (0.820-0.912)  ε ≤ 2.31  9.1 s  4 min left`, as far as it is known."""
        parts = [f"loss {_number(sum(self._losses) / len(self._losses))}"] if self._losses else []
        parts += [self._score] if self._score else []
        parts += [f"ε ≤ {rounded_up(self._epsilon, 2)}"] if self._epsilon is not None else []
        if self._seconds:
            parts.append(f"{self._seconds[-1]:.1f} s")
            recent = self._seconds[-RECENT:]
            parts += [f"{_duration(sum(recent) / len(recent) * self._left)} left"] if self._left else []
        return "  ".join(parts)


def waiting(event: Event) -> str:
    """Which sites the next round waits for."""
    return f"waiting for sites that are not connected ({event['sites']}), at most {_duration(event['seconds'])}"


def preamble(event: Event) -> list[str]:
    """What the file of weights gave, who came late, and one line for every site with images that could not be read."""
    lines = [f"weights: {event['weights']}"] if "weights" in event else []
    lines += [f"{site} joins in round {event['round']}" for site in event.get("joined_late", ())]
    return lines + [
        f"{site}: {_images(facts['images'])} left out, unreadable (fewer than data.max-unreadable): {facts['reasons']}"
        for site, facts in event.get("unreadable", {}).items()
    ]


def _images(count: int | None) -> str:
    """In words; None = a site does not tell how many."""
    return "images" if count is None else f"{count} image{'s' if count > 1 else ''}"


def score(event: Event, primary: str) -> str:
    """The primary metric of an evaluation with its interval."""
    return f"{primary} {interval(event['metrics'].get(primary))}"


def interval(metric: Mapping[str, Any] | None) -> str:
    """A metric as text: value and 95 % interval, or the noise that it bears; or why there is no value."""
    if metric is None:
        return "null (not evaluated)"
    if metric["value"] is None:
        return "null (noise)" if "noise" in metric else "null (one class, or too few patients)"
    if metric.get("noise") is not None:
        return f"{metric['value']:.3f} (noise ± {metric['noise']:.3f})"
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"


def charge(config: RunConfig) -> str:
    """What a private run costs, before it costs it."""
    privacy = config.privacy
    given = privacy.noise_multiplier
    cost = f"what noise-multiplier = {given:g} comes to" if given else f"ε = {privacy.epsilon:g}"
    more = f" and ε = {privacy.metrics_epsilon:g} for its metrics" if privacy.metrics_epsilon else ""
    return (
        f"Privacy: each site charges its patients {cost}{more} (δ = {privacy.delta:g}), all of it before the first "
        "round and however the run ends. At a hospital that comes off policy.privacy.epsilon for good."
    )


def console() -> Console:
    """Where tables go."""
    return Console(stderr=False, highlight=False)


def _progress(*more: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *more,
        TextColumn("{task.fields[facts]}", markup=False),
        console=Console(stderr=True),
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
