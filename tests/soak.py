"""A server and three sites on loopback, run after run: is the memory of every process that stays flat?

    make soak [MINUTES=60]        or        python tests/soak.py --minutes 60

Prints one line per program, and ends with status 1 if one grew: its median over the last quarter of the time is above
that over the second quarter by more than a tenth and 10 MiB. The first quarter is for caches to fill. A program that
was started again counts on under its name, and its line says how often.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
from real_consortium import RUN, Started, make_consortium, online, wait_for

SITES = ("a-40", "b-20", "c-20")
EVERY_S = 5.0
GROWTH, SLACK_MIB = 1.1, 10.0
PROGRAMS = ("fedmed.deployment.", "flower-")
STAYS_S = 60.0  # what lives less long is a task
Memory = dict[str, list[tuple[float, frozenset[int], float]]]  # of a program: (s from the beginning, pids, MiB in all)


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--minutes", type=float, default=60.0)
    minutes = options.parse_args().minutes
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (here, here.parent)))  # children find `toy`
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDMED_RUNS"] = str(Path(folder) / "runs")
        return soak(Path(folder), minutes * 60)


def soak(root: Path, seconds: float) -> int:
    server = make_consortium(root, list(SITES))
    started = {"server": Started("server", "start", server, log=root / "server.out")}
    memory: Memory = defaultdict(list)
    runs = 0
    try:
        started["server"].says(f"{SITES[-1]} may connect", 240)
        started |= {name: Started("site", "start", root / name, log=root / f"{name}.out") for name in SITES}
        wait_for(lambda: online(server) == set(SITES), 400, lambda: f"only {online(server)} came")
        (root / "run.toml").write_text(RUN)
        begun = time.monotonic()
        current: Started | None = None
        while time.monotonic() < begun + seconds:
            if current is None or current.process.poll() is not None:
                if current is not None and current.process.returncode:
                    print(current.log.read_text(), file=sys.stderr)
                    return 1
                runs += 1
                current = Started("server", "submit", root / "run.toml", "--server", server, "--wait",
                                  log=root / "submit.out")  # fmt: skip
            for name, each in started.items():
                measure(memory, name, each.process.pid, time.monotonic() - begun)
            time.sleep(EVERY_S)
        if current is not None:
            current.process.wait(600)
    finally:
        for each in reversed(list(started.values())):
            each.stop()
    print(f"{runs} runs of two rounds in {seconds / 60:.0f} min")
    return report(memory, seconds)


def measure(memory: Memory, name: str, pid: int, at_s: float) -> None:
    """Note the resident memory of a runner and of every program below it that stays, by the program's name."""
    runner = psutil.Process(pid)
    found: dict[str, dict[int, float]] = defaultdict(dict)  # of a program: MiB of each process
    for process in (runner, *runner.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            if time.time() - process.create_time() > STAYS_S:
                names = (Path(word).name for word in process.cmdline())
                what = next((word for word in names if word.startswith(PROGRAMS)), process.name())
                what = "runner" if process == runner else what
                found[what][process.pid] = process.memory_info().rss / 2**20
    for what, sizes in found.items():
        memory[f"{name}: {what}"].append((at_s, frozenset(sizes), sum(sizes.values())))


def report(memory: Memory, seconds: float) -> int:
    """Print a line for every program; 1 if one grew."""
    grew = 0
    for name, points in sorted(memory.items()):
        early = [size for at, _, size in points if seconds / 4 <= at < seconds / 2]
        late = [size for at, _, size in points if at >= 3 * seconds / 4]
        started = len(frozenset().union(*(pids for _, pids, _ in points))) - max(len(pids) for _, pids, _ in points)
        again = f", started again {started} times" if started else ""
        if not early or not late:
            print(f"{name:50} was not there all the time{again}")
            continue
        before, after = statistics.median(early), statistics.median(late)
        grows = after > before * GROWTH and after > before + SLACK_MIB
        grew += grows
        print(f"{name:50} {before:8.1f} MiB  {after:8.1f} MiB  {'GREW' if grows else 'flat'}{again}")
    return int(grew > 0)


if __name__ == "__main__":
    sys.exit(main())
