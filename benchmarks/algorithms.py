"""Time a round of every algorithm and robust rule beside plain PyTorch's federated averaging of the same steps.

    .venv/bin/python benchmarks/algorithms.py               # about half an hour a repeat; run nothing beside it
    .venv/bin/python benchmarks/algorithms.py --work small-cnn-32 --only fedavg scaffold

The work, the floor and the way to time are those of `engine.py`, and so is the bar: 1.10 × plain PyTorch doing the same
steps. The floor is FedAvg's; Ditto's sites take its steps twice, and one site's are a round of `cyclic`. What else an
algorithm does is part of its ratio: control variates travel, or networks are judged. `fedbn` is timed on DenseNet-121
alone: the CNN has no norm layers. Ways take turns, and the floor has one before every fifth way: what counts is its
median, for a machine's speed drifts within half an hour. The table is printed, and written to
benchmarks/algorithms.md when all of it is run.
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
    "fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox", "scaffold", "fednova", "fedbn", "ditto",
    "feddg-ga", "cyclic",
)  # fmt: skip
RULES = ("median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median")
WITHOUT_NORMS = "small-cnn-32"
FLOOR, FLOOR_EVERY = "plain PyTorch", 5
MOST = 1.10  # times plain PyTorch that does the same steps, of wall time and of CPU time
BESIDES = {
    "scaffold": "the control variate of the server travels to the sites",
    "ditto": "every site trains a second network",
    "feddg-ga": "every site judges two networks on a batch that it holds out",
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
        f"plain PyTorch. The bar is {MOST:.2f} × plain PyTorch doing the same steps, of wall time and of CPU time: "
        "more for Ditto, which takes FedAvg's steps twice, and less for one site after the other.\n\n"
        "| work | way | steady round, s | wall ratio | CPU s a round | CPU ratio | at most | bar | "
        "besides FedAvg's work |\n|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows)
    )
    print(text)
    if given.work is None and given.only == [*ALGORITHMS, *RULES]:
        Path(__file__).with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def table(name: str, ways: list[str], repeats: int, folder: Path) -> list[str]:
    """Rows of one kind of work, the floor first."""
    short, long = WORKS[name].rounds
    ways = [way for way in ways if (way, name) != ("fedbn", WITHOUT_NORMS)]
    samples: dict[str, list[tuple[Measured, Measured]]] = {way: [] for way in (FLOOR, *ways)}

    def sample(way: str) -> None:
        samples[way].append((timed(way, name, short, folder), timed(way, name, long, folder)))
        print(f"  {name} {way}: {samples[way][-1][1].wall_s:.1f} s", file=sys.stderr, flush=True)

    for _ in range(repeats):
        for number, way in enumerate(ways):
            if number % FLOOR_EVERY == 0:
                sample(FLOOR)
            sample(way)
    wall = {way: statistics.median((b.wall_s - a.wall_s) / (long - short) for a, b in samples[way]) for way in samples}
    cpu = {way: statistics.median((b.cpu_s - a.cpu_s) / (long - short) for a, b in samples[way]) for way in samples}
    base, cpu_base = wall[FLOOR], cpu[FLOOR]
    return [
        f"| {name} | {way} | {wall[way]:.3f} | {wall[way] / base:.2f} | {cpu[way]:.3f} | {cpu[way] / cpu_base:.2f} | "
        f"{verdict(way, name, wall[way] / base, cpu[way] / cpu_base)} | {BESIDES.get(way, '')} |"
        for way in samples
    ]


def verdict(way: str, name: str, wall: float, cpu: float) -> str:
    """Two cells: the ratios that a way may have, and whether its ratios, as they are shown, meet them."""
    if way == FLOOR:
        return "– | –"
    sites = WORKS[name].sites
    steps = {"ditto": (2.0, 2.0), "cyclic": (min(CORES, sites) / sites, 1 / sites)}.get(way, (1.0, 1.0))
    most = [round(MOST * each, 2) for each in steps]
    missed = [
        what for what, ratio, limit in zip(("wall", "CPU"), (wall, cpu), most, strict=True) if round(ratio, 2) > limit
    ]
    said = f"missed: {' and '.join(missed)}" if missed else "met"
    return f"{most[0]:.2f} | {said}" if most[0] == most[1] else f"{most[0]:.2f}, CPU {most[1]:.2f} | {said}"


def timed(way: str, name: str, rounds: int, folder: Path) -> Measured:
    """One whole command: the floor's, or fedmed's with this way."""
    if way == FLOOR:
        return floor(name, rounds, folder, full=False, memory=False)
    keys = [f"strategy.{'combine' if way in RULES else 'name'}={way}"]
    if way == "feddg-ga":
        keys.append("evaluate.site-share=0.2")
    return fedmed(name, rounds, folder, full=False, memory=False, keys=keys)


if __name__ == "__main__":
    main()
