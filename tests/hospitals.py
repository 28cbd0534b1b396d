"""Three hospitals and their server over TLS, each in processes of its own, and what their records say in the end."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from real_consortium import Started, make_consortium, online, wait_for

SITES = ("a-40", "b-20", "c-20")


class OnSmallDisk(Started):
    """A `fedmed … start` whose folder lies on a disk of its own, which nobody else sees mounted."""

    def __init__(self, *words: object, disk: Path, mebibytes: int, log: Path, **environment: str) -> None:
        self.log, self._disk = log, disk
        mounted = (
            f"cp -a {disk} {disk}.kept && mount -t tmpfs -o size={mebibytes}m,nr_inodes=2000 none {disk} && "
            f'cp -a {disk}.kept/. {disk} && exec "$@"'
        )
        fedmed = [sys.executable, "-m", "fedmed", *map(str, words)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                ["unshare", "-rm", "sh", "-c", mounted, "sh", *fedmed],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )

    @property
    def folder(self) -> Path:
        """The folder, as the process has it."""
        return Path(f"/proc/{self.process.pid}/root{self._disk}")

    def fill(self) -> None:
        """Leave not a byte and not a name, whatever a task gives back meanwhile."""
        ballast = self.folder / "ballast"
        ballast.mkdir()

        def full() -> bool:
            with contextlib.suppress(OSError), (ballast / "bytes").open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with contextlib.suppress(OSError):
                for number in range(2000):
                    (ballast / str(number)).touch()
            return shutil.disk_usage(self.folder).free == 0

        wait_for(full, 10, lambda: "the disk does not fill")

    def free(self) -> None:
        shutil.rmtree(self.folder / "ballast")


class Hospitals:
    """A server and its sites, all of which run."""

    def __init__(self, root: Path, address: str = "127.0.0.1") -> None:
        self.root = root
        self.server = make_consortium(root, list(SITES), address)
        self.environment: dict[str, dict[str, str]] = {}
        self.small: dict[str, int] = {}  # MiB of the disk, of the server or a site that has one of its own
        self.started: dict[str, Started] = {}
        self.runs = 0

    def start(self, name: str) -> None:
        """Start a site, or the "server"."""
        words = ("server" if name == "server" else "site", "start", self.root / name)
        given = {"log": self.root / f"{name}.out", **self.environment.get(name, {})}
        if name in self.small:
            disk = OnSmallDisk(*words, disk=self.root / name, mebibytes=self.small[name], **given)
            self.started[name] = disk
        else:
            self.started[name] = Started(*words, **given)

    def start_all(self) -> None:
        self.start("server")
        self.started["server"].says("c-20 may connect", 240)
        for name in SITES:
            self.start(name)
        self.complete()

    def stop(self) -> None:
        for each in reversed(list(self.started.values())):
            each.stop()

    def folder(self, name: str) -> Path:
        """Of a site, or of the "server", wherever it is mounted."""
        started = self.started[name]
        return started.folder if isinstance(started, OnSmallDisk) else self.root / name

    def complete(self) -> None:
        wait_for(lambda: online(self.server) == set(SITES), 300, lambda: f"only {online(self.server)} came")

    def submit(self, text: str) -> Started:
        """Submit a run; one that is called "toy" gets a name of its own, by which what the sites recorded is found."""
        self.runs += 1
        run = self.root / f"run-{self.runs}.toml"
        run.write_text(text.replace('name = "toy"\n', f'name = "toy-{self.runs}"\n', 1))
        log = self.root / f"run-{self.runs}.out"
        return Started("server", "submit", run, "--server", self.server, "--wait", "--json", log=log)

    def run_folder(self, name: str) -> Path | None:
        """Of the run of that name, once it has events."""
        return next((path.parent for path in self.folder("server").glob(f"runs/*-{name}-*/events.jsonl")), None)

    def events(self, name: str) -> list[dict]:
        """Those of the run of that name so far."""
        folder = self.run_folder(name)
        lines = (folder / "events.jsonl").read_text().splitlines(keepends=True) if folder else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def seen(self, name: str, kind: str, round: int) -> bool:
        return any((event["kind"], event["round"]) == (kind, round) for event in self.events(name))

    def result(self, submitted: Started, timeout_s: float = 600) -> dict:
        """What the run says in the end, after its record was compared with what the sites recorded."""
        submitted.process.wait(timeout_s)
        facts = json.loads(submitted.log.read_text().splitlines()[-1])
        return self.checked(Path(facts["folder"]))

    def checked(self, folder: Path) -> dict:
        """The result in a run folder, after its record was compared with what the sites recorded."""
        return checked(folder, self.folder)


def checked(folder: Path, site: Callable[[str], Path]) -> dict:
    """The result in a run folder, after its record was compared with its events and with the sites' own manifests.

    Args:
        folder: of a run over all `SITES`, whose name no other run has.
        site: gives the folder of a site.
    """
    result = json.loads((folder / "result.json").read_text())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for entry in result["rounds_log"]:
        joined, round = set(entry["joined"]), entry["round"]
        begun = max(n for n, e in enumerate(events) if (e["kind"], e["round"]) == ("round_started", round))  # again
        came = {e["site"] for e in events[begun:] if (e["kind"], e["round"]) == ("update_received", round)}
        failed = {failure["site"] for failure in entry["failed"]}
        assert joined == came
        assert all(sent(site(name), result["name"], round) for name in joined)
        assert joined.isdisjoint(failed) and joined | failed == set(SITES)
        assert all(failure["reason"] for failure in entry["failed"])
    whole = all(set(entry["joined"]) == set(SITES) for entry in result["rounds_log"])
    assert result["status"] == ("completed" if whole else "degraded")
    return result


def sent(site: Path, run: str, round: int) -> bool:
    """Whether a site's own manifest says that its update of a round left it."""
    bodies = [json.loads(line)["body"] for line in (site / "state" / "egress.jsonl").read_text().splitlines()]
    return any((body["run"], body["round"], body["task"]) == (run, round, "train") for body in bodies)
