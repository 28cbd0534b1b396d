"""Time a round of every algorithm and robust rule beside plain PyTorch's federated averaging of the same steps.

    .venv/bin/python benchmarks/algorithms.py               # about twenty minutes; run nothing beside it
    .venv/bin/python benchmarks/algorithms.py --work small-cnn-32 --only fedavg scaffold

The work, the floor and the way to time are those of `engine.py`. The floor is FedAvg's; what an algorithm does besides
(control variates travel, every site trains a second network) is part of its ratio. `fedbn` is timed with DenseNet-121
alone, as the CNN has no layers for it; left out is `feddg-ga`, which needs patients held out and so does other steps.
Ways take turns. The table is printed, and written to benchmarks/algorithms.md when all of it is run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from engine import CORES, Measured, fedmed, floor
from work import WORKS

ALGORITHMS = (
    "fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox",
    "scaffold", "fednova", "fedbn", "ditto", "cyclic",
)  # fmt: skip
RULES = ("median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median")
BAR = 1.10  # CPU time of a round, to the floor's
BESIDES = {
    "scaffold": "the control variate of the server travels to the sites",
    "ditto": "every site trains a second network",
    "cyclic": "one site after the other, on one core",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=[*WORKS], action="append", help="default: all")
    parser.add_argument("--only", choices=[*ALGORITHMS, *RULES], nargs="+", default=[*ALGORITHMS, *RULES])
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    rows: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fedmed-bench-") as temporary:
        for name in given.work or WORKS:
            rows += table(name, given.only, given.repeats, Path(temporary))
    text = (
        "# Algorithms\n\n"
        f"`{' '.join(['python benchmarks/algorithms.py', *sys.argv[1:]])}` on {time.strftime('%Y-%m-%d')}, "
        f"{CORES} cores, {platform.machine()}, no GPU; repeats: {given.repeats}. Ratios are to a round of FedAvg in "
        "plain PyTorch.\n\n"
        "| work | way | steady round, s | wall ratio | CPU s a round | CPU ratio "
        f"| bar {BAR:.2f} | besides FedAvg's work |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows)
    )
    print(text)
    if given.work is None and given.only == [*ALGORITHMS, *RULES]:
        Path(__file__).with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def table(name: str, ways: list[str], repeats: int, folder: Path) -> list[str]:
    """Rows of one kind of work, the floor first."""
    short, long = WORKS[name].rounds
    fits = [way for way in ways if way != "fedbn" or "densenet" in name]
    samples: dict[str, list[tuple[Measured, Measured]]] = {"plain PyTorch": []} | {way: [] for way in fits}
    for _ in range(repeats):
        for way, found in samples.items():
            found.append((timed(way, name, short, folder), timed(way, name, long, folder)))
            print(f"  {name} {way}: {found[-1][1].wall_s:.1f} s", file=sys.stderr, flush=True)
    wall = {way: statistics.median((b.wall_s - a.wall_s) / (long - short) for a, b in samples[way]) for way in samples}
    cpu = {way: statistics.median((b.cpu_s - a.cpu_s) / (long - short) for a, b in samples[way]) for way in samples}
    base, cpu_base = wall["plain PyTorch"], cpu["plain PyTorch"]
    return [
        f"| {name} | {way} | {wall[way]:.3f} | {wall[way] / base:.2f} | {cpu[way]:.3f} | {cpu[way] / cpu_base:.2f} | "
        f"{'met' if cpu[way] / cpu_base <= BAR else 'missed'} | {BESIDES.get(way, '')} |"
        for way in samples
    ]


def timed(way: str, name: str, rounds: int, folder: Path) -> Measured:
    """One whole command: the floor's, or fedmed's with this way."""
    if way == "plain PyTorch":
        return floor(name, rounds, folder, full=False, memory=False)
    key = f"strategy.{'combine' if way in RULES else 'name'}={way}"
    return fedmed(name, rounds, folder, full=False, memory=False, keys=[key])


if __name__ == "__main__":
    main()
