"""The demo federation through Flower's own simulation, `flwr run . local`, with nothing left running afterwards.

`flwr run . local` starts a SuperLink in the background and leaves it there. Here it gets a home and a port of its own,
and is ended with everything that it started. Needs the standard library alone, and Linux for finding processes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).absolute().parent
PROC = Path("/proc")
PATIENCE_S = 10.0  # between asking a process to end and ending it

Process = tuple[int, str]  # pid and start time, which together are never used again


def main() -> int:
    """Run, clean up, report; Flower's exit status, or 1 where the run itself did not get to its end."""
    options = parse()
    runs = Path(os.environ.get("FEDMED_RUNS") or REPOSITORY / "runs").absolute()
    before = set(runs.glob("*"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="fedmed-flower-", ignore_cleanup_errors=True) as home:
        try:
            code = subprocess.run(command(options), env=environment(home, runs), cwd=REPOSITORY, check=False).returncode
        except KeyboardInterrupt:
            code = 130
        finally:
            left = end_all(f"FLWR_HOME={home}".encode())
    if left:
        print(f"error: still running: process {', '.join(map(str, left))}", file=sys.stderr)
        return code or 1
    made = sorted(set(runs.glob("*")) - before, key=lambda folder: folder.stat().st_mtime)
    if not made:
        print("error: Flower made no run folder; its log is above", file=sys.stderr)
        return code or 1
    return conclude(made[-1], code)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The demo federation through `flwr run . local`.")
    parser.add_argument("--supernodes", type=int, default=4, help="virtual hospitals; as many as data.sites")
    parser.add_argument(
        "-c", "--run-config", action="append", default=[], metavar="KEYS", help='such as "train.rounds=1 seed=3"'
    )
    return parser.parse_args()


def command(options: argparse.Namespace) -> list[str]:
    """What a user types, with the path of flwr in front."""
    extra = [part for keys in options.run_config for part in ("-c", keys)]
    nodes = f"num-supernodes={options.supernodes}"
    return [str(BIN / "flwr"), "run", str(REPOSITORY), "local", "--stream", "--federation-config", nodes, *extra]


def environment(home: str, runs: Path) -> dict[str, str]:
    """Flower with its own home and port, which installs nothing and calls nobody."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": home,
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "FEDMED_RUNS": str(runs),
    }


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def conclude(folder: Path, code: int) -> int:
    """Write the report of a run folder, print where it is, and judge the run."""
    result = folder / "result.json"
    if not result.exists():
        print(f"error: {folder} has no result.json; Flower's log is above", file=sys.stderr)
        return code or 1
    reported = subprocess.run([sys.executable, "-m", "fedmed", "report", str(folder)], cwd=REPOSITORY, check=False)
    status = json.loads(result.read_text(encoding="utf-8"))["status"]
    print(f"{status}: {folder}")
    return code or reported.returncode or int(status in ("failed", "paused"))


def end_all(mark: bytes) -> list[int]:
    """End every process whose environment holds `mark`, and their children, each by its pid.

    Returns:
        The pids of those that are still there.
    """
    if not PROC.is_dir():
        print("this system has no /proc: end Flower's SuperLink yourself (flower-superlink)", file=sys.stderr)
        return []
    ours: set[Process] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE_S
        asked: set[Process] = set()
        while time.monotonic() < deadline:
            ours |= found(mark)
            alive = {process for process in ours if start_time(process[0]) == process[1]}
            if not alive:
                return []
            for pid, _ in alive - asked:
                send(pid, number)
            asked |= alive
            time.sleep(0.1)
    return sorted(pid for pid, start in ours if start_time(pid) == start)


def found(mark: bytes) -> set[Process]:
    """The marked processes of this machine and all that descend from them: a process may have renamed itself."""
    parents = {int(folder.name): parent(int(folder.name)) for folder in PROC.iterdir() if folder.name.isdigit()}
    marked = {pid for pid in parents if mark in read(pid, "environ").split(b"\0")}
    size = 0
    while size != len(marked):
        size = len(marked)
        marked |= {pid for pid, above in parents.items() if above in marked}
    return {(pid, start_time(pid)) for pid in marked if start_time(pid)}


def start_time(pid: int) -> str:
    """When a process started, in ticks since boot; empty when it is gone or only waits to be collected."""
    fields = stat(pid)
    return fields[19] if fields and fields[0] not in ("Z", "X") else ""


def parent(pid: int) -> int:
    """The parent of a process; 0 when it is gone."""
    fields = stat(pid)
    return int(fields[1]) if fields else 0


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: what is before may hold spaces (proc(5))."""
    return read(pid, "stat").rpartition(b")")[2].decode().split()


def read(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty when the process is gone or somebody else's."""
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended by itself."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main())
