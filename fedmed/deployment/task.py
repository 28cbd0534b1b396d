"""One task at a site, as two processes: one that speaks with the SuperNode, and one, confined, that sees the patients.

Both are forked from the warm process. The first has the network and no data; it hands the message over, watches, and
sends the answer on. The second has the data and no network. When it hangs, is killed or runs out of memory, the first
ends it and answers in its place at once, with the rule and what to do.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

from fedmed.deployment.confinement import Confinement, confine
from fedmed.deployment.files import make_folder
from fedmed.deployment.processes import LINUX, PR_SET_PDEATHSIG, descendants, kill
from fedmed.deployment.site_folder import SiteFolder
from fedmed.federated.client_app import app

LONGEST_S = 86_400.0
LOOK_S = 1.0
IDLE = 0.01  # of a processor: what uses less, and reads and writes nothing, makes no progress
SAY_S = 2.0  # for a task that is ended to print where it was
SIZE = 8  # bytes of the number in front of what one process tells the other


class Worker:
    """The process that sees the patients. Made before the other one starts a thread, and it waits for its message."""

    def __init__(self, site: SiteFolder) -> None:
        """Fork it."""
        self._site = site
        self._channel, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._channel.close()
            _work(site, theirs)
        theirs.close()

    def __call__(self, message: Message, context: Context) -> Message:
        """Have the message answered; whatever happens to the worker, there is an answer.

        The worker is gone afterwards.
        """
        limit_s = float(context.run_config.get("strategy.round-timeout-s", LONGEST_S))
        deadline = time.monotonic() + min(max(limit_s, 1.0), LONGEST_S)
        watch = Watch(self.pid, stalls_after_s=self._site.config.task_stalls_after_s)
        self._channel.settimeout(LOOK_S)
        try:
            for content in (message_to_proto(message), context_to_proto(context)):
                self._tell(content.SerializeToString(), watch, deadline)
            answer = MessageProto.FromString(self._hear(watch, deadline))
        except (TimeoutError, EOFError, ConnectionError) as problem:
            self.end(say=isinstance(problem, TimeoutError))
            code, reason = _ended(problem)
            print(f"error {code}: {reason}", file=sys.stderr, flush=True)
            return Message(Error(code, reason), reply_to=message)
        self.end()
        return message_from_proto(answer)

    def end(self, *, say: bool = False) -> None:
        """Kill it and what it started.

        Args:
            say: whether it shall first print where it is.
        """
        self._channel.close()
        below = descendants(self.pid)
        if say:
            os.kill(self.pid, signal.SIGABRT)
            _wait(self.pid, SAY_S)
        kill({self.pid, *below})

    def _tell(self, content: bytes, watch: Watch, deadline: float) -> None:
        view = memoryview(len(content).to_bytes(SIZE) + content)
        while view:
            try:
                view = view[self._channel.send(view) :]
            except TimeoutError:
                watch.look(deadline)

    def _hear(self, watch: Watch, deadline: float) -> bytearray:
        size = int.from_bytes(self._receive(SIZE, watch, deadline))
        return self._receive(size, watch, deadline)

    def _receive(self, size: int, watch: Watch, deadline: float) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            try:
                got = self._channel.recv_into(view)
            except TimeoutError:
                watch.look(deadline)
                continue
            if not got:
                raise EOFError
            view = view[got:]
        return content


class Watch:
    """Whether a process and its children get on: they compute, read or write."""

    def __init__(self, pid: int, *, stalls_after_s: float) -> None:
        """Watch from now on; `stalls_after_s` = 0 watches the deadline alone."""
        self._pid, self._stalls_after_s = pid, stalls_after_s
        self._since, self._done = time.monotonic(), work_done(pid)

    def look(self, deadline: float) -> None:
        """Raise where it is time to give up.

        Raises:
            TimeoutError: with "deadline", or with "stalled" and for how long.
        """
        now = time.monotonic()
        if now >= deadline:
            raise TimeoutError("deadline")
        if not self._stalls_after_s or now - self._since < self._stalls_after_s:
            return
        done = work_done(self._pid)
        if done[0] - self._done[0] < IDLE * (now - self._since) and done[1] == self._done[1]:
            raise TimeoutError(f"stalled {self._stalls_after_s:g}")
        self._since, self._done = now, done


def work_done(pid: int) -> tuple[float, int]:
    """Seconds of processor time, and bytes read and written, of a process and all below it (proc(5))."""
    seconds, moved = 0.0, 0
    tick = os.sysconf("SC_CLK_TCK")
    for each in {pid, *descendants(pid)}:
        try:
            fields = Path(f"/proc/{each}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / tick  # utime stime cutime cstime
            moved += sum(int(line.split()[1]) for line in Path(f"/proc/{each}/io").read_text().splitlines()[:2])
        except OSError:  # it ended while we looked
            continue
    return seconds, moved


def records_folders(site: SiteFolder) -> Iterator[Path]:
    """Where a task at this site writes what is kept; made if they are not there."""
    config = site.config
    yield make_folder(site.root / (config.state_dir or "state"))
    if config.cache_dir:
        yield make_folder(site.root / config.cache_dir)
    if config.policy is not None and config.policy.privacy.witness:
        witness = site.root / config.policy.privacy.witness
        if witness.is_dir():
            yield witness


def scratch(site: SiteFolder) -> Path:
    """The folder of temporary files of a site's tasks."""
    return site.flower / "tmp"


def confine_task(site: SiteFolder, *, records: bool = True) -> Confinement:
    """Confine this process as a task at this site is.

    Args:
        site: whose limits hold.
        records: whether it may write to the site's state, ledger, witness and cache.
    """
    folders = [make_folder(scratch(site)), *(records_folders(site) if records else ())]
    tempfile.tempdir = os.environ["TMPDIR"] = str(folders[0])
    return confine(writable=folders, memory_gib=site.config.task_memory_gib, processors=site.config.task_cpus)


def _work(site: SiteFolder, channel: socket.socket) -> NoReturn:
    """The worker's life: confine itself, hear a message, answer it."""
    code = 1
    try:
        parent = os.getppid()
        confine_task(site)
        if LINUX:  # only now: entering a namespace clears it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        faulthandler.enable()  # SIGABRT prints the lines of code that it stands in, and no value
        with channel.makefile("rwb") as stream:
            parts = [stream.read(int.from_bytes(stream.read(SIZE))) for _ in range(2)]
            if not parts[1]:  # the app was refused
                os._exit(0)
            message = message_from_proto(MessageProto.FromString(parts[0]))
            context = context_from_proto(ContextProto.FromString(parts[1]))
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = context.run_id, context.node_id, 0
            content = message_to_proto(app(message, context)).SerializeToString()
            stream.write(len(content).to_bytes(SIZE))
            stream.write(content)
        code = 0
    except BaseException as error:  # its text may hold anything
        print(f"the task ended by {type(error).__name__}", file=sys.stderr)
        traceback.print_tb(error.__traceback__)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _ended(problem: Exception) -> tuple[int, str]:
    """Code and reason of a task that did not answer: what happened, what to do, and the rule."""
    what, _, seconds = str(problem).partition(" ")
    if what == "deadline":
        return ErrorCode.CLIENT_APP_RAISED_EXCEPTION, (
            "the task was not done at the round's deadline and was ended; give rounds more time, or this site fewer "
            "images (strategy.round-timeout-s)"
        )
    if what == "stalled":
        return ErrorCode.CLIENT_APP_RAISED_EXCEPTION, (
            f"the task made no progress for {seconds} s and was ended; the site's log says where it stood "
            "(task-stalls-after-s)"
        )
    return ErrorCode.CLIENT_APP_CRASHED, (  # the server asks once more
        "the task was killed before it answered; the site should look for a lack of memory (task.killed)"
    )


def _wait(pid: int, timeout_s: float) -> None:
    """Wait for a child to end, without taking its exit status."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended: Any = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return
        time.sleep(0.05)
