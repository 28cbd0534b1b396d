"""Run two sweeps over the ways to deal patients, and write their tables into README.md.

`python run.py OUT` needs no data. Runs that both sweeps have are trained once; what was run before is reused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
PARTITIONS = {"iid": "IID", "dirichlet": "Dirichlet(0.1)", "as-given": "by hospital"}
SWEEPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "algorithms": ("strategy.name", ("fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "fednova")),
    "dropout": ("strategy.fraction", ("1.0", "0.75", "0.5")),
}
Found = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description="Federations of more and less unlike hospitals, by algorithm.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the experiments' folder")
    parser.add_argument("--seeds", type=int, default=0, help="of every point; 0 = as in run.toml")
    options = parser.parse_args(arguments)
    readme = HERE / "README.md"
    for name, (key, values) in SWEEPS.items():
        words = ["--vary", f"simulation.partition={','.join(PARTITIONS)}", "--vary", f"{key}={','.join(values)}"]
        words += ["--set", f"evaluate.seeds={options.seeds}"] if options.seeds else []
        report = fedmed("sweep", HERE / "run.toml", *words, "--out", options.out)
        (options.out / "sweep.html").replace(options.out / f"{name}.html")
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
        text = f"{before}{begin}\n\n{text_of(report, key)}\n\n{end}{rest.partition(end)[2]}"
        readme.write_text(text, encoding="utf-8")
        print(f"wrote {readme}; plot: {options.out / f'{name}.html'}")
    return 0


def fedmed(*words: object) -> Found:
    """What a command of fedmed prints with --json."""
    command = [sys.executable, "-m", "fedmed", *map(str, words), "--json"]
    paths = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: Found = json.loads(done.stdout)
    return found


def text_of(report: Found, key: str) -> str:
    """The points as Markdown: a row for each value of the key, a column for each partition."""
    cells = {(p["values"]["simulation.partition"], p["values"][key]): p["endpoint"] for p in report["points"]}
    rows = dict.fromkeys(value for _, value in cells)
    seeds = len(report["seeds"])
    lines = [
        f"{report['primary'].upper()} at the server's patients; {seeds} seed{'s' if seeds > 1 else ''}; 95 % "
        f"intervals: {report['intervals']}.",
        "",
        f"| `{key}` | " + " | ".join(PARTITIONS.values()) + " |",
        "|---|" + "---|" * len(PARTITIONS),
    ]
    lines += [f"| {row} | " + " | ".join(spread(cells[place, row]) for place in PARTITIONS) + " |" for row in rows]
    return "\n".join(lines)


def spread(found: Found) -> str:
    """A value and its interval."""
    value, low, high = ("–" if found[part] is None else f"{found[part]:.3f}" for part in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


if __name__ == "__main__":
    sys.exit(main())
