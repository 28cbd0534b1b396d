"""Time what a round of a real deployment costs besides training: TLS, keys, SuperLink, SuperNodes, tasks.

    .venv/bin/python benchmarks/deployment.py                      # about twenty minutes; run nothing beside it
    .venv/bin/python benchmarks/deployment.py --rounds 2 --arms ours

DenseNet-121 at 64 px, three sites of phantom radiographs on loopback. Per round: the wall time from its start until the
last update is admitted and added, less the training of the slowest site as the site itself saw it. The server's
evaluation and checkpoint come after that and do not count. `ours` is `fedmed site start`; `stock` is Flower's own
SuperNode, which starts a process for every task, with the same app, server, network and data. The table is printed and
written to benchmarks/deployment.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmed.deployment.consortium import read_consortium
from fedmed.deployment.control import control, nodes
from fedmed.deployment.coordinators import own_entrance
from fedmed.deployment.kits import read_kit
from fedmed.deployment.processes import Child, flower_environment, free_port
from fedmed.deployment.site_folder import joined_kit, read_site_folder
from fedmed.deployment.supernode import site_command
from fedmed.durable import make_private
from fedmed.errors import RunFailed

HERE = Path(__file__).parent
SITES = ("site-1", "site-2", "site-3")
BAR_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Round:
    number: int
    wall_s: float
    slowest_s: float

    @property
    def overhead_s(self) -> float:
        return self.wall_s - self.slowest_s


def fedmed(*words: object) -> str:
    command = [sys.executable, "-m", "fedmed", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(root: Path, patients: int) -> Path:
    """Phantom hospitals, and a consortium of them: gives the server's folder."""
    fedmed("data", "synth", root / "data", "--sites", len(SITES), "--patients", patients)
    server = root / "server"
    fedmed("server", "init", server, "--name", "bench", "--address", "127.0.0.1", "--port", free_port())
    for site in SITES:
        fedmed("site", "init", root / site, "--manifest", root / "data" / site / "manifest.csv")
        fedmed("site", "keygen", root / site)
    fedmed("server", "provision", server, *(root / site / "card.json" for site in SITES))
    for site in SITES:
        kit = server / "kits" / site
        fedmed("site", "join", kit, "--site", root / site, "--coordinator", read_kit(kit).fingerprint)
    return server


@contextlib.contextmanager
def started(*words: object, log: Path) -> Iterator[None]:
    """A `fedmed … start`, ended by SIGTERM."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedmed", *map(str, words)], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


@contextlib.contextmanager
def stock_node(root: Path, site: str) -> Iterator[None]:
    """Flower's own SuperNode with the site's key: without the door to fedmed's warm process."""
    folder = read_site_folder(root / site)
    log = logging.Logger(site)
    log.addHandler(logging.FileHandler(root / f"{site}-stock.log"))
    environment = flower_environment(make_private(folder.flower / "stock"), FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.5")
    child = Child(site_command(folder, joined_kit(folder), free_port()), environment, log)
    try:
        yield
    finally:
        child.end()


def await_sites(server: Path, timeout_s: float = 400.0) -> None:
    folder, deadline = read_consortium(server), time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(RunFailed), control(own_entrance(folder)) as client:
            if sum(node.status == "online" for node in nodes(client)) == len(SITES):
                return
        if time.monotonic() > deadline:
            raise RuntimeError("the sites did not come")
        time.sleep(1.0)


def measure(root: Path, server: Path, arm: str, rounds: int) -> list[Round]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(started("server", "start", server, log=root / "server.out"))
        for site in SITES:
            ours = started("site", "start", root / site, log=root / f"{site}.out")
            stack.enter_context(ours if arm == "ours" else stock_node(root, site))
        await_sites(server)
        words = ("--set", f"train.rounds={rounds}", "--set", "model.name=chexnet", "--set", "data.image-size=64")
        said = fedmed("server", "submit", root / "data" / "run.toml", "--server", server, "--wait", "--json", *words)
    folder = Path(json.loads(said)["folder"])
    result = json.loads((folder / "result.json").read_text())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    trained: dict[int, list[float]] = {}
    for event in events:
        if event["kind"] == "update_received":
            trained.setdefault(event["round"], []).append(event["seconds"])
    if any(len(times) != len(SITES) for times in trained.values()):
        raise RuntimeError("a site did not take part in every round; nothing is compared")
    return [
        Round(number=entry["round"], wall_s=entry["seconds"], slowest_s=max(trained[entry["round"]]))
        for entry in result["rounds_log"]
    ]


def table(found: dict[str, list[Round]]) -> str:
    lines = ["| sites run | round | wall (s) | slowest training (s) | besides (s) |", "|---|---|---|---|---|"]
    for arm, rounds in found.items():
        for each in rounds:
            lines.append(
                f"| {arm} | {each.number} | {each.wall_s:.1f} | {each.slowest_s:.1f} | {each.overhead_s:.1f} |"
            )
        later = [each.overhead_s for each in rounds[1:]]
        lines.append(f"| {arm} | median after the first | | | {statistics.median(later):.1f} (bar {BAR_S:g}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--patients", type=int, default=24, help="per site")
    parser.add_argument("--arms", nargs="+", choices=("ours", "stock"), default=["ours", "stock"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="fedmed-deployment-") as name:
        root = Path(name)
        server = prepare(root, options.patients)
        found = {arm: measure(root, server, arm, options.rounds) for arm in options.arms}
    text = table(found)
    print(text)
    kind = re.sub(r"\s+", " ", platform.processor() or platform.machine())
    head = "# What a deployed round costs besides training\n\n"
    about = f"DenseNet-121, 64 px, {len(SITES)} sites on loopback, TLS and keys; {os.cpu_count()} cores, {kind}.\n\n"
    again = "`benchmarks/deployment.py` writes this file.\n\n"
    (HERE / "deployment.md").write_text(head + about + again + text + "\n")


if __name__ == "__main__":
    main()
