"""A table out of the result.json files of one or more runs, for the README of a simulation.

`python simulations/table.py RUN... --metrics dice hd95` prints one line per run with the server's values and their
95 % intervals, where a run has any; `--mean` adds mean and standard deviation over the runs, for folds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder")
    parser.add_argument("--metrics", nargs="+", required=True, help='names in result.json, as in "dice/anterior"')
    parser.add_argument("--mean", action="store_true", help="a last line of mean and standard deviation over the runs")
    options = parser.parse_args(arguments)
    try:
        results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in options.runs]
    except (OSError, ValueError):
        print("error: a RUN has no readable result.json; it has not ended, or is no run folder", file=sys.stderr)
        return 1
    print(f"| run | patients | {' | '.join(options.metrics)} | s | status |")
    print("|---" * (len(options.metrics) + 4) + "|")
    for run, result in zip(options.runs, results, strict=True):
        cells = [shown(result, name) for name in options.metrics]
        seconds = f"{result['timing']['total_s']:.0f}"
        print(f"| {run.name} | {patients(result)} | {' | '.join(cells)} | {seconds} | {result['status']} |")
    if options.mean:
        cells = [spread([value_of(result, name) for result in results]) for name in options.metrics]
        print(f"| mean ± standard deviation | | {' | '.join(cells)} | | |")
    return 0


def value_of(result: dict[str, Any], name: str) -> float | None:
    """The server's value of a metric; None where it is undefined or was not measured."""
    found: float | None = (result["server"]["metrics"].get(name) or {}).get("value")
    return found


def shown(result: dict[str, Any], name: str) -> str:
    """A value with its interval, "0.912 (0.890-0.931)"."""
    metric = result["server"]["metrics"].get(name) or {}
    if metric.get("value") is None:
        return "null"
    interval = "" if metric.get("low") is None else f" ({metric['low']:.3f}–{metric['high']:.3f})"
    return f"{metric['value']:.3f}{interval}"


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over the runs (n - 1) of what is defined."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "null"
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known):.3f}"


def patients(result: dict[str, Any]) -> int:
    """How many patients judged."""
    return max((metric["n"] for metric in result["server"]["metrics"].values()), default=0)


if __name__ == "__main__":
    sys.exit(main())
