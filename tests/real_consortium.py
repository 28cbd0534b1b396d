"""A consortium on loopback, made by fedmed's own commands: folders, keys, kits, and processes of both sides."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import typer

from fedmed.cli import app
from fedmed.deployment.processes import free_port
from fedmed.errors import FedmedError

RUN = """\
name = "toy"
[model]
name = "toy:network"
[task]
labels = ["a", "b"]
[train]
rounds = 2
optimizer = "sgd"
learning-rate = 0.1
weight-decay = 0.0
[strategy]
min-sites = 2
max-weight-share = 1.0
"""


def command(*words: object) -> object:
    """A `fedmed` command, in this process: importing once is enough. Returns a status that it ended with early."""
    return typer.main.get_command(app).main(list(map(str, words)), standalone_mode=False)


def make_site(root: Path, name: str) -> Path:
    """A site with keys and a card, whose data are toy data of its name."""
    folder = root / name
    command("site", "init", folder, "--manifest", name)
    path = folder / "site.toml"
    head, table, policy = path.read_text().partition("[policy]")
    head = head.replace('dataset = ""', 'dataset = "toy:dataset"').replace(
        "networks = []", 'networks = ["toy:network", "toy:slow", "toy:heavy"]'
    )
    path.write_text(head + table + policy)
    command("site", "keygen", folder)
    return folder


def make_consortium(root: Path, names: list[str], address: str = "127.0.0.1") -> Path:
    """A server's folder, and beside it those of its sites, which have joined."""
    from fedmed.deployment.kits import read_kit

    sites = [make_site(root, name) for name in names]
    server = root / "server"
    command("server", "init", server, "--name", "toys", "--address", address, "--port", free_port())
    command("server", "provision", server / "consortium.toml", *(site / "card.json" for site in sites))
    for site in sites:
        kit = server / "kits" / site.name
        command("site", "join", kit, "--site", site, "--coordinator", read_kit(kit).fingerprint)
    return server


def online(server: Path) -> set[str]:
    """The sites that are connected; none while the server does not answer."""
    said = io.StringIO()
    with contextlib.suppress(FedmedError, OSError), contextlib.redirect_stdout(said):
        command("server", "status", server, "--json")
        return {site["site"] for site in json.loads(said.getvalue())["sites"] if site["status"] == "online"}
    return set()


def words_of(process: psutil.Process) -> list[str]:
    """The command line of a process; no words once it has ended, reaped or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def processes_of(runner: int) -> dict[str, psutil.Process]:
    """What a site's runner started, by what it is: `supernode`, `launcher`, `warm`; of a task `messenger`, `worker`."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(runner).children():
            words = " ".join(words_of(process))
            found |= {"supernode": process} if "fedmed.deployment.node" in words else {}
            found |= {"warm": process} if "fedmed.deployment.warm" in words else {}
        for process in found["supernode"].children() if "supernode" in found else []:
            found |= {"launcher": process} if "flower-superexec" in " ".join(words_of(process)) else {}
        messengers = found["warm"].children() if "warm" in found else []
        workers = messengers[0].children() if messengers else []
        found |= {"messenger": messengers[0], "worker": workers[0]} if workers else {}
    return found


def recorded(site: Path, log: str, task: str) -> int:
    """How many lines of a site's audit log, or of its egress manifest, are of tasks of that kind."""
    path = site / "state" / f"{log}.jsonl"
    return path.read_text().count(f'"task":"{task}"') if path.exists() else 0


class Started:
    """A `fedmed … start` in a process of its own."""

    def __init__(self, *words: object, log: Path, **environment: str) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedmed", *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )

    def says(self, text: str, timeout_s: float = 120) -> None:
        """Wait until it said something."""
        wait_for(lambda: text in self.log.read_text(), timeout_s, lambda: f"no {text!r} in: {self.log.read_text()}")

    def stop(self) -> tuple[int, list[psutil.Process]]:
        """SIGTERM; gives the exit status and what it left behind, which is then killed by its pid."""
        below = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        return code, left


def wait_for(met: Callable[[], bool], timeout_s: float, said: Callable[[], str], pause_s: float = 0.2) -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        if time.monotonic() > deadline:
            raise AssertionError(said())
        time.sleep(pause_s)
