"""Processes that a runner starts, watches and ends, with all that they started themselves.

On Linux the runner adopts orphans of its children (prctl(2), PR_SET_CHILD_SUBREAPER), so that none escapes it, and its
children get SIGTERM when it is killed itself (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler, SysLogHandler
from pathlib import Path
from types import FrameType
from typing import Literal

from fedmed.durable import make_private
from fedmed.errors import ConfigError, RunFailed

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LOG_BYTES, LOG_FILES = 5_000_000, 5
SYSLOG = "/dev/log"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GRACE_S = 15.0  # Flower ends by itself in 3–10 s
NAP_S = 0.1
KILL_S, KILL_NAP_S = 10.0, 0.01
KILLS = 3  # a process that is being killed may just have started another
LINUX = sys.platform == "linux"
EXIT_CODE = re.compile(r"Exit Code: (\d+)")
CONNECTED, LOST = re.compile(r"SuperNode ID: \d|Connection successful"), re.compile(r"Connection attempt failed")
BAD_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def flower_environment(home: Path, *, near: Sequence[str] = (), **more: str) -> dict[str, str]:
    """The environment of a Flower process that installs nothing, reports to nobody and asks for no update.

    Args:
        home: its own folder.
        near: addresses besides loopback that no proxy leads to.
        more: variables besides.
    """
    beside = str(Path(sys.executable).parent)  # where flower-superexec and its kin are looked for
    exempt = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK, *near)))
    return {
        **os.environ,
        "NO_PROXY": exempt,  # what the processes here say to each other is not for the hospital's proxy
        "no_proxy": exempt,
        "PATH": os.pathsep.join(filter(None, (beside, os.environ.get("PATH", "")))),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1",  # two at once may take longer than Flower waits
        "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "1",  # likewise
        "FORWARDED_ALLOW_IPS": "127.0.0.1",  # nginx; from elsewhere a header must not say that a request is from here
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def program(name: str) -> str:
    """One of Flower's commands, from the environment that fedmed is installed in.

    Raises:
        ConfigError: it is not there.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(f"{name} is not installed beside this Python; install fedmed with its dependencies")
    return str(path)


def log_file(folder: Path, name: str, to: Literal["file", "syslog", "journal"] = "file") -> logging.Logger:
    """A log: a file of at most 25 MB, whose older lines are dropped; the system's syslog; or stderr, for a journal.

    Raises:
        ConfigError: this system has no syslog.
    """
    handler: logging.Handler
    if to == "syslog":
        if not Path(SYSLOG).is_socket():
            raise ConfigError(f'log-to = "syslog": nothing listens at {SYSLOG}; choose "file" or "journal"')
        handler = SysLogHandler(SYSLOG)
        handler.setFormatter(logging.Formatter(f"fedmed-{name}: %(message)s"))
    elif to == "journal":
        handler = logging.StreamHandler()
    else:
        make_private(folder)
        handler = RotatingFileHandler(folder / f"{name}.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.raiseExceptions = False  # a line that finds the disk full is lost, without twenty others on stderr
    log = logging.Logger(name)
    log.addHandler(handler)
    return log


class Stop:
    """Whether a runner was asked to stop. A signal sets it, so it holds no lock, which `threading.Event` does."""

    def __init__(self) -> None:
        """Not yet."""
        self._asked = False

    def set(self) -> None:
        """Ask."""
        self._asked = True

    def is_set(self) -> bool:
        """Whether it was asked."""
        return self._asked

    def wait(self, timeout_s: float) -> None:
        """Sleep, at most until it is asked."""
        deadline = time.monotonic() + timeout_s
        while not self._asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, NAP_S))


class Child:
    """A process whose lines go to a log."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: logging.Logger) -> None:
        """Start it in a session of its own, so that Ctrl-C reaches the runner alone."""
        self.flower_code: int | None = None  # Flower's own exit code, which it only prints
        self.bad_certificate = False  # whether it refused the other side's
        self.connected = False  # whether a SuperNode reached the server, by what it last said
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if LINUX else None,
        )
        self.started = time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join(timeout=1.0)
        return True

    def end(self) -> None:
        """Ask it to end, wait, then kill it and whatever it started."""
        below = descendants(self.pid)
        if self.running:
            self._process.terminate()
            if not self.wait(GRACE_S):
                below |= descendants(self.pid)
                self._process.kill()
                self.wait(KILL_S)
        kill(below & descendants(os.getpid()))  # a number may belong to somebody else by now

    def _read(self, log: logging.Logger) -> None:
        assert self._process.stdout is not None  # it is a pipe
        with self._process.stdout as lines:
            for line in lines:
                text = COLOUR.sub("", line.decode(errors="replace")).rstrip()
                found = EXIT_CODE.search(text)
                self.bad_certificate |= BAD_CERTIFICATE in text
                self.flower_code = int(found[1]) if found else self.flower_code
                self.connected = bool(CONNECTED.search(text)) or (self.connected and not LOST.search(text))
                log.info(text)


def descendants(pid: int) -> set[int]:
    """Every process that a process started, and those that these started; empty where /proc is not there."""
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        for path in Path(f"/proc/{ahead.pop()}/task").glob("*/children"):
            with suppress(OSError):
                new = set(map(int, path.read_text().split())) - found
                found |= new
                ahead += new
    return found


def kill(pids: set[int]) -> None:
    """Kill processes, and wait for those that became ours; not for ever for one that a dead disk or GPU holds."""
    for pid in sorted(pids):  # whoever started others first, else it starts another in the place of one that is killed
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left, deadline = pids, time.monotonic() + KILL_S
    while (left := set(filter(_still_ours, left))) and time.monotonic() < deadline:
        time.sleep(KILL_NAP_S)


def _still_ours(pid: int) -> bool:
    """Whether this is a child that has not ended; the exit status of one that has is taken."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


def reap(keep: set[int]) -> None:
    """Take the exit status of orphans that ended, so that they do not stay as zombies."""
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that ended while we looked
            for pid in set(map(int, path.read_text().split())) - keep:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


@contextmanager
def runner(folder: Path, what: str) -> Iterator[Stop]:
    """Be the one runner of a folder; gives what SIGTERM and Ctrl-C set. No child outlives the block.

    Raises:
        ConfigError: another runner is at work there.
    """
    make_private(folder)
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    with (folder / "runner.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"this {what} runs already") from None
        if LINUX:
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield stop
        finally:
            for _ in range(KILLS):
                kill(descendants(os.getpid()))
            for number, handler in before.items():
                signal.signal(number, handler)


def wait_until(met: Callable[[], bool], stop: Stop, timeout_s: float, every_s: float = 0.2) -> bool:
    """Whether something came true before the time was over or a stop was asked for."""
    deadline = time.monotonic() + timeout_s
    while not stop.is_set() and time.monotonic() < deadline:
        if met():
            return True
        stop.wait(every_s)
    return False


def require_free_port(host: str, port: int, key: str) -> None:
    """See whether a program could listen there now. Flower's and nginx's own words for it stand in a log.

    Args:
        host: name or address of this machine.
        port: TCP.
        key: of consortium.toml, which names the port.

    Raises:
        RunFailed: another program listens there, or nobody can.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections that are being closed
            tried.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"another program listens on port {port} of {host}; end it, or change {key} in consortium.toml"
        else:
            why = error.strerror or type(error).__name__
            text = f"nothing can listen on port {port} of {host} ({why}); change listen or {key} in consortium.toml"
        raise RunFailed(text) from None


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
