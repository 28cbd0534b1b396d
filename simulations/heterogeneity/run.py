"""Run sweeps over the ways to deal patients, and write their tables into README.md.

`python run.py OUT` needs no data; `--data DATA` runs chest X-rays and lungs instead. Runs that two sweeps share are
trained once; what was run before is reused.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))

from readme import Found, fedmed, put, spread  # noqa: E402  # lies beside the simulations

SWEEPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "algorithms": ("strategy.name", ("fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "fednova")),
    "dropout": ("strategy.fraction", ("1.0", "0.75", "0.5")),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A run file, and the ways to deal its patients: values of simulation.partition, and what the table calls them."""

    name: str
    partitions: Mapping[str, str]
    prepared: str = ""  # the folder that simulations/real-cxr/prepare.py writes; "" = phantoms

    @property
    def run_file(self) -> Path:
        """The study's own."""
        return HERE / f"{self.name}.toml"


BY_LABEL = {"iid": "IID", "dirichlet": "Dirichlet(0.1)", "as-given": "by hospital"}
BY_SIZE = {"iid": "IID", "quantity": "sizes ~ Dirichlet(0.1)", "as-given": "by hospital"}
PHANTOMS = Study(name="phantoms", partitions=BY_LABEL)
REAL = (
    Study(name="xrays", partitions=BY_LABEL, prepared="classification"),
    Study(name="lungs", partitions=BY_SIZE, prepared="lungs"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description="Federations of more and less unlike hospitals, by algorithm.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the experiments' folder")
    parser.add_argument("--data", type=Path, help="the folder that holds cxr/dev and seg2d/dev")
    parser.add_argument("--only", choices=[study.name for study in REAL], help="one of the two studies of real images")
    parser.add_argument("--seeds", type=int, default=0, help="of every point; 0 = as in the run file")
    options = parser.parse_args(arguments)
    if options.only and not options.data:
        parser.error("--only chooses among real images; give --data too")
    if options.data:
        command = [sys.executable, HERE.parent / "real-cxr" / "prepare.py", options.data, options.out / "data"]
        subprocess.run(command, check=True)
    for study in REAL if options.data else (PHANTOMS,):
        if options.only not in (None, study.name):
            continue
        run, out = study.run_file, options.out / study.name
        if study.prepared:
            run = options.out / "data" / study.prepared / study.run_file.name
            shutil.copyfile(study.run_file, run)
        for name, (key, values) in SWEEPS.items():
            words = [
                "--vary",
                f"simulation.partition={','.join(study.partitions)}",
                "--vary",
                f"{key}={','.join(values)}",
            ]
            words += ["--set", f"evaluate.seeds={options.seeds}"] if options.seeds else []
            report = fedmed("sweep", run, *words, "--out", out)
            (out / "sweep.html").replace(out / f"{name}.html")
            put(HERE / "README.md", f"{study.name}: {name}", text_of(report, key, study.partitions))
            print(f"wrote the table of {study.name}: {name}; plot: {out / f'{name}.html'}", flush=True)
    return 0


def text_of(report: Found, key: str, partitions: Mapping[str, str]) -> str:
    """The points as Markdown: a row for each value of the key, a column for each partition."""
    cells = {(p["values"]["simulation.partition"], p["values"][key]): p["endpoint"] for p in report["points"]}
    rows = dict.fromkeys(value for _, value in cells)
    seeds = len(report["seeds"])
    lines = [
        f"{report['primary']} of the server's patients; {seeds} seed{'s' if seeds > 1 else ''}; 95 % intervals: "
        f"{report['intervals']}.",
        "",
        f"| `{key}` | " + " | ".join(partitions.values()) + " |",
        "|---|" + "---|" * len(partitions),
    ]
    lines += [f"| {row} | " + " | ".join(spread(cells[place, row]) for place in partitions) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
