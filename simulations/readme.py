"""What the experiments share that write their own tables: calling fedmed, and putting a table into a README.md.

Python alone is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def fedmed(*words: object) -> Found:
    """What a command of fedmed prints with --json.

    Raises:
        CalledProcessError: it failed, and said why on stderr.
    """
    command = [sys.executable, "-m", "fedmed", *map(str, words), "--json"]
    paths = [str(Path(__file__).absolute().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: Found = json.loads(done.stdout)
    return found


def put(readme: Path, name: str, text: str) -> None:
    """Replace what stands in `readme` between `<!-- begin: name -->` and `<!-- end: name -->`."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    readme.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def number(value: float | None) -> str:
    """Three decimals; a dash for what is undefined or was not tested."""
    return "–" if value is None else f"{value:.3f}"


def difference(one: Found) -> str:
    """The difference of two arms and its 95 % interval; without the interval where nothing can be resampled."""
    between = "" if one["low"] is None else f" ({one['low']:+.3f} to {one['high']:+.3f})"
    return f"{one['difference']:+.3f}{between}"


def comparisons(report: Found) -> list[str]:
    """The declared comparisons as rows of Markdown."""
    lines = ["| comparison | difference | p | p, Holm |", "|---|---|---|---|"]
    for one in report["comparisons"]:
        tested = f"{number(one['p'])} | {number(one['p_holm'])}"
        lines.append(f"| {one['first']} − {one['second']} | {difference(one)} | {tested} |")
    return lines


def spread(found: Found) -> str:
    """A value and its 95 % interval."""
    return f"{number(found['value'])} ({number(found['low'])}–{number(found['high'])})"
