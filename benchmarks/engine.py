"""Time fedmed's one-machine engine against plain PyTorch and against Flower's Ray simulation of the same app.

    make bench                                  # all of it, about half an hour; run nothing beside it
    .venv/bin/python benchmarks/engine.py --work small-cnn-32 --repeats 1

Engines run in turn, each as a whole process, at a short and a long number of rounds. A steady round is the difference
of the two, so that start-up cancels. Memory is read in runs of its own, because reading it costs time. The networks of
all engines are compared: they add up the same float32 numbers in another order, and training magnifies the last digit
from round to round. The table, and which bars its figures meet, are printed and written to benchmarks/engine.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from work import WORKS, Work

HERE = Path(__file__).parent
CORES = os.cpu_count() or 1
FASTER_THAN_RAY = {"small-cnn-32": 2.5, "densenet121-8": 1.6}  # times, in a steady round


@dataclass(frozen=True, kw_only=True)
class Row:
    """An engine's figures for one kind of work; ratios are to plain PyTorch."""

    engine: str
    steady_s: float
    wall: float
    cpu: float
    first: float  # to a steady round
    memory: float  # 0 where it was not read
    whole_s: float  # of the command, at the short run
    after_imports_s: float
    text: str  # as the table shows them


@dataclass(frozen=True)
class Measured:
    wall_s: float
    cpu_s: float  # user and system time of the whole process tree
    peak_mib: float  # summed proportional set size of the tree; 0 where it was not asked for
    rounds_s: list[float]  # as the engine itself saw them


def tree(root: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        found.append(queue.pop())
        queue += parents.get(found[-1], [])
    return found


def memory_mib(root: int) -> float:
    total = 0
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(command: list[str], rounds: Callable[[str], list[float]], *, memory: bool) -> Measured:
    """Run a command to its end, orphans included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "FLWR_TELEMETRY_ENABLED": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        peak, done = [0.0], threading.Event()

        def poll() -> None:
            while not done.wait(0.3):
                peak[0] = max(peak[0], memory_mib(child.pid))

        poller = threading.Thread(target=poll)
        if memory:
            poller.start()
        out, err = child.communicate()
        done.set()
        if memory:
            poller.join()
    wall = time.perf_counter() - started
    while True:  # Ray's orphans come to us, the subreaper
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{err[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(wall, cpu, peak[0], rounds(out))


def run_file(name: str, work: Work, rounds: int, folder: Path, *, full: bool) -> Path:
    sites = ", ".join(f'"{name}-{number}"' for number in range(work.sites))
    every = 1 if full else 10**6
    path = folder / f"{name}-{rounds}-{full}.toml"
    path.write_text(
        f"""
[model]
name = "{work.network}"
in-channels = {work.channels}
[task]
labels = [{", ".join(f'"l{label}"' for label in range(work.labels))}]
[data]
sites = [{sites}]
server = "{f"{name}-server" if full else ""}"
dataset = "work:dataset"
[train]
rounds = {rounds}
batch-size = {work.batch}
optimizer = "sgd"
learning-rate = {work.learning_rate}
weight-decay = 0.0
[strategy]
checkpoint-every = {every}
[evaluate]
every = {every}
site-share = 0.0
bootstrap = 0
keep = "last"
""",
        encoding="utf-8",
    )
    return path


def floor(name: str, rounds: int, folder: Path, *, full: bool, memory: bool) -> Measured:
    out = folder / f"floor-{name}-{rounds}"
    out.mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "floor.py"), name, str(rounds), "--processes", str(CORES), "--out", str(out)]
    return measure(command + (["--full"] if full else []), lambda text: json.loads(text)["round_s"], memory=memory)


def fedmed(
    name: str, rounds: int, folder: Path, *, full: bool, memory: bool, engine: str = "local", keys: Sequence[str] = ()
) -> Measured:
    out = folder / f"{engine}-{name}-{rounds}"
    shutil.rmtree(out, ignore_errors=True)
    path = run_file(name, WORKS[name], rounds, folder, full=full)
    command = [sys.executable, "-m", "fedmed", "simulate", str(path), "--quiet", "--engine", engine, "--out", str(out)]
    command += [word for key in keys for word in ("--set", key)]

    def rounds_of(_: str) -> list[float]:
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        return [event["seconds"] for event in events if event["kind"] == "round_finished"]

    return measure(command, rounds_of, memory=memory)


def ray(name: str, rounds: int, folder: Path, *, full: bool, memory: bool) -> Measured:
    return fedmed(name, rounds, folder, full=full, memory=memory, engine="ray")


def flower(name: str, rounds: int, folder: Path, *, full: bool, memory: bool) -> Measured:
    out = folder / f"flower-{name}-{rounds}"
    out.mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "flower_own.py"), name, str(rounds), "--out", str(out)]
    return measure(command, lambda text: json.loads(text.splitlines()[-1])["round_s"], memory=memory)


ENGINES: dict[str, Callable[..., Measured]] = {
    "plain PyTorch": floor,
    "fedmed": fedmed,
    "fedmed over Flower's Ray": ray,
    "Flower's FedAvg.start over Ray": flower,
}

IMPORTS = {  # what the engine's own process imports before it can begin
    "plain PyTorch": "floor",
    "fedmed": "fedmed.federated.simulation, fedmed.reporting.report",
    "fedmed over Flower's Ray": "fedmed.federated.simulation, fedmed.reporting.report, ray",
    "Flower's FedAvg.start over Ray": "flower_own, ray",
}


def importing_s(engine: str) -> float:
    """Wall seconds of an interpreter that imports what the engine needs, and ends."""
    command = [sys.executable, "-c", f"import {IMPORTS[engine]}"]
    return min(measure(command, lambda text: [], memory=False).wall_s for _ in range(3))


def weights(engine: str, name: str, rounds: int, folder: Path) -> np.ndarray:
    if engine == "plain PyTorch":
        return np.load(folder / f"floor-{name}-{rounds}" / "floor.npy")
    if engine == "Flower's FedAvg.start over Ray":
        return np.load(folder / f"flower-{name}-{rounds}" / "flower.npy")
    run = folder / f"{'local' if engine == 'fedmed' else 'ray'}-{name}-{rounds}" / "checkpoints"
    return load_file(run / f"round-{rounds:04d}.safetensors")["parameters"]


def compare(name: str, engines: list[str], repeats: int, folder: Path, *, full: bool) -> list[Row]:
    """Rows of the table for one kind of work."""
    short, long = WORKS[name].rounds
    samples: dict[str, list[tuple[Measured, Measured]]] = {engine: [] for engine in engines}
    for repeat in range(repeats):
        for engine in engines:
            pair = tuple(ENGINES[engine](name, rounds, folder, full=full, memory=False) for rounds in (short, long))
            samples[engine].append(pair)
            print(
                f"  {name} {'full' if full else 'bare'} {repeat + 1}/{repeats} {engine}: "
                f"{pair[0].wall_s:.1f} s, {pair[1].wall_s:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    peaks = {e: 0.0 if full else ENGINES[e](name, short + 2, folder, full=full, memory=True).peak_mib for e in engines}
    steady = {e: [(b.wall_s - a.wall_s) / (long - short) for a, b in samples[e]] for e in engines}
    processor = {e: [(b.cpu_s - a.cpu_s) / (long - short) for a, b in samples[e]] for e in engines}
    reference = {rounds: weights(engines[0], name, rounds, folder) for rounds in (short, long)}
    rows = []
    for engine in engines:
        wall, base = statistics.median(steady[engine]), statistics.median(steady[engines[0]])
        cpu, cpu_base = statistics.median(processor[engine]), statistics.median(processor[engines[0]])
        first = statistics.median(pair[1].rounds_s[0] for pair in samples[engine])
        inner = statistics.median(value for pair in samples[engine] for value in pair[1].rounds_s[1:])
        whole = statistics.median(pair[0].wall_s for pair in samples[engine])
        after = max(0.0, whole - importing_s(engine))
        apart = [float(np.abs(weights(engine, name, n, folder) - reference[n]).max()) for n in (short, long)]
        memory = f"{peaks[engine]:.0f} | {peaks[engine] / peaks[engines[0]]:.2f}" if peaks[engine] else "– | –"
        text = (
            f"| {titled(name, full=full)} | {engine} | {wall:.3f} "
            f"({min(steady[engine]):.3f}-{max(steady[engine]):.3f}) | {wall / base:.2f} | {cpu:.3f} | "
            f"{cpu / cpu_base:.2f} | {first / inner:.2f} | {memory} | {whole:.1f} | {after:.1f} | "
            f"{apart[0]:.0e}, {apart[1]:.0e} |"
        )
        rows.append(
            Row(
                engine=engine,
                steady_s=wall,
                wall=wall / base,
                cpu=cpu / cpu_base,
                first=first / inner,
                memory=peaks[engine] / peaks[engines[0]] if peaks[engine] else 0.0,
                whole_s=whole,
                after_imports_s=after,
                text=text,
            )
        )
    return rows


def titled(name: str, *, full: bool) -> str:
    return f"{name}{', evaluation and checkpoints on' if full else ''}"


def bars(name: str, rows: Sequence[Row], *, full: bool) -> list[str]:
    """A line for every bar of one kind of work: what is asked of fedmed, what was found, and whether that is met."""
    of = {row.engine: row for row in rows}
    ours, title = of["fedmed"], titled(name, full=full)
    lines = [
        bar(f"{title}: wall time of a steady round to plain PyTorch's", ours.wall, most=1.10),
        bar(f"{title}: CPU time of a steady round to plain PyTorch's", ours.cpu, most=1.10),
        bar(f"{title}: first round to a steady one", ours.first, most=1.5),
    ]
    if ours.memory:
        lines.append(bar(f"{title}: memory to plain PyTorch's", ours.memory, most=1.2))
    for ray in (row for row in rows if "Ray" in row.engine):
        versus = f"{title}, {ray.engine} to fedmed"
        lines.append(bar(f"{versus}: a steady round", ray.steady_s / ours.steady_s, least=FASTER_THAN_RAY[name]))
        lines.append(bar(f"{versus}: the whole command", ray.whole_s / ours.whole_s, least=2.5))
        if WORKS[name].rounds[0] == 5 and ours.after_imports_s:
            after = ray.after_imports_s / ours.after_imports_s
            lines.append(bar(f"{versus}: five rounds after imports", after, least=10.0))
    return lines


def bar(what: str, ratio: float, *, least: float = 0.0, most: float = math.inf) -> str:
    """One line of a verdict, by the ratio as it is shown."""
    asked = f"at least {least:.2f}" if least else f"at most {most:.2f}"
    return f"bar {what}, {asked}, is {ratio:.2f}: {'met' if least <= round(ratio, 2) <= most else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=[*WORKS], action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-ray", action="store_true")
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    engines = [engine for engine in ENGINES if not (given.without_ray and "Ray" in engine)]
    rows: list[Row] = []
    verdicts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fedmed-bench-") as temporary:
        for name in given.work or WORKS:
            for full in (False, True):
                found = compare(name, engines[:2] if full else engines, given.repeats, Path(temporary), full=full)
                rows += found
                verdicts += bars(name, found, full=full)
    head = (
        "| work | engine | steady round, s (min-max) | wall ratio | CPU s a round | CPU ratio | first / steady round "
        "| peak MiB | memory ratio | whole command at the short run, s | after imports, s | "
        "largest difference of a weight, short and long run |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    rounds = ", ".join(f"{name}: {work.rounds[0]} and {work.rounds[1]}" for name, work in WORKS.items())
    text = (
        "# One-machine engine\n\n"
        f"`{' '.join(['python benchmarks/engine.py', *sys.argv[1:]])}` on {time.strftime('%Y-%m-%d')}, {CORES} cores, "
        f"{platform.processor() or platform.machine()}, no GPU, {given.repeats} repeats, engines in turn. "
        f"Rounds of the short and the long run: {rounds}. Ratios are to plain PyTorch. "
        "Tables of earlier days: [engine-history.md](engine-history.md).\n\n"
        + "\n".join([head, *(row.text for row in rows)])
        + "\n\n"
        + "\n".join(f"* {line}" for line in verdicts)
    )
    print(text)
    if given.work is None:
        (HERE / "engine.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
