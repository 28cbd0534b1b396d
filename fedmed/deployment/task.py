"""One task at a site, as two processes: one that speaks with the SuperNode, and one, confined, that sees the patients.

Both are forked from the warm process. The first has the network and no data; it hands the message over, watches, and
sends the answer on. The second has the data and no network. When it hangs, is killed or runs out of memory, the first
ends it and answers in its place at once, with the rule and what to do.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedmed.deployment.confinement import Confinement, confine
from fedmed.deployment.processes import descendants, kill
from fedmed.deployment.scratch import scratch
from fedmed.deployment.site_folder import SiteFolder
from fedmed.durable import make_private
from fedmed.errors import PolicyRefused
from fedmed.federated.client_app import app, public_reason
from fedmed.federated.local_worker import HEADER_LIMIT, RUN_ID, channel_pair, question, read_answer, work
from fedmed.federated.spool import Spool

LOOK_S = 1.0
IDLE = 0.01  # of a processor: what uses less, and reads and writes nothing, makes no progress
QUESTION, ANSWER = "question", "answer"  # files that both processes map
App = Callable[[Message, Context], Message]
SAY_S = 2.0  # for a task that is ended to print where it was


class ConfinedWorker:
    """The process that sees the patients. Made before the other one starts a thread, and it waits for its message.

    It is the worker of a simulation (`fedmed.federated.local_worker`), confined: headers go through a socket, arrays
    through files of a folder that is removed afterwards.
    """

    def __init__(self, site: SiteFolder) -> None:
        """Fork it."""
        self._site = site
        self._folder = Path(tempfile.mkdtemp(prefix="task-", dir=scratch(site)))
        self._channel, theirs = channel_pair()
        self.pid = os.fork()
        if self.pid == 0:
            _work(site, theirs, self._channel, self._folder)
        theirs.close()

    def __call__(self, message: Message, context: Context) -> Message:
        """Have the message answered; whatever happens to the worker, there is an answer.

        The worker is gone afterwards.
        """
        spool = Spool(self._folder)
        try:
            deadline = time.monotonic() + limit_s(context.run_config, self._site.config.task_longest_s)
            self._channel.sendall(question(message, spool.write(QUESTION, message.content), ANSWER))
            said = read_answer(self._hear(deadline))
            if isinstance(said, Error):
                return _failure(said, message)
            if json.loads(said)["slot"] != ANSWER:  # it may write to its own files; this process could to others
                raise ConnectionError
            return Message(_owned(spool.read(said)), reply_to=message)
        except OSError as problem:  # a TimeoutError among them
            return _failure(_ended(problem), message)
        finally:
            self.end()

    def end(self) -> None:
        """Kill it and what it started, and remove what the two exchanged."""
        if self._channel.fileno() < 0:  # done before
            return
        self._channel.close()
        kill({self.pid, *descendants(self.pid)})
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hear(self, deadline: float) -> bytes:
        """Its answer.

        Raises:
            TimeoutError: it hangs, or is late.
            ConnectionError: it is dead.
        """
        stall = Stall(self.pid, stalls_after_s=self._site.config.task_stalls_after_s)
        self._channel.settimeout(LOOK_S)
        while True:
            try:
                answer = self._channel.recv(HEADER_LIMIT)
            except TimeoutError:
                why = stall.look(deadline)
                if why:
                    os.kill(self.pid, signal.SIGABRT)  # it prints where it stands
                    _wait(self.pid, SAY_S)
                    raise TimeoutError(why) from None
                continue
            if not answer:
                raise ConnectionError
            return answer


def limit_s(run_config: Mapping[str, Any], longest_s: float) -> float:
    """How long a task may take: as a run's configuration says, which comes from the server, and at most `longest_s`."""
    try:
        asked = float(run_config.get("strategy.round-timeout-s", longest_s))
    except (TypeError, ValueError, OverflowError):
        return longest_s
    return min(max(asked, 1.0), longest_s) if math.isfinite(asked) else longest_s


class Stall:
    """Whether a process and its children get on: they compute, read or write."""

    def __init__(self, pid: int, *, stalls_after_s: float) -> None:
        """Watch from now on; `stalls_after_s` = 0 watches the deadline alone."""
        self._pid, self._stalls_after_s = pid, stalls_after_s
        self._since, self._done = time.monotonic(), work_done(pid)

    def look(self, deadline: float) -> str:
        """Why it is time to give up, in words for both sides; "" where it is not."""
        now = time.monotonic()
        if now >= deadline:
            return (
                "the task was not done at the round's deadline and was ended; give rounds more time, or this site "
                "fewer images or a longer limit of its own (task-longest-s, strategy.round-timeout-s)"
            )
        if not self._stalls_after_s or now - self._since < self._stalls_after_s:
            return ""
        done = work_done(self._pid)
        if done[0] - self._done[0] < IDLE * (now - self._since) and done[1] == self._done[1]:
            return (
                f"the task made no progress for {self._stalls_after_s:g} s and was ended; the site's log says where it "
                "stood (task-stalls-after-s)"
            )
        self._since, self._done = now, done
        return ""


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
    yield make_private(site.state)
    if config.cache_dir:
        yield make_private(site.root / config.cache_dir)
    if config.policy is not None and config.policy.privacy.witness:
        witness = site.root / config.policy.privacy.witness
        if witness.is_dir():
            yield witness


def confine_task(site: SiteFolder, *, records: bool = True) -> Confinement:
    """Confine this process as a task at this site is.

    Args:
        site: whose limits hold.
        records: whether it may write to the site's state, ledger, witness and cache.
    """
    folders = [scratch(site), *(records_folders(site) if records else ())]
    tempfile.tempdir = os.environ["TMPDIR"] = str(folders[0])
    return confine(writable=folders, memory_gib=site.config.task_memory_gib, processors=site.config.task_cpus)


def refusal(site: SiteFolder, held: Confinement) -> PolicyRefused | None:
    """Why a site that asks for confinement takes no task where this much holds; None where it takes them."""
    if not site.config.require_confinement or not held.gaps:
        return None
    text = (
        f"this site's machine does not wholly confine a task ({', '.join(held.gaps)}), which the site asks for "
        "(require-confinement)"
    )
    return PolicyRefused(text, rule="require-confinement")


def failed(error: Exception) -> App:
    """An app that answers every message with why there is no work: a full disk, a site.toml that is wrong."""
    said = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, public_reason(error))
    return lambda message, context: Message(said, reply_to=message)


def _work(site: SiteFolder, channel: socket.socket, other: socket.socket, folder: Path) -> NoReturn:
    """The worker's life: confine itself, hear a message, answer it, and end with its channel."""
    code = 1
    try:
        other.close()
        refused = refusal(site, confine_task(site))
        faulthandler.enable()  # SIGABRT prints the lines of code that it stands in, and no value
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = RUN_ID
        node = {"site": str(site.file)}
        work(channel, failed(refused) if refused else app, defaultdict(lambda: node), {}, folder, site.config.device)
        code = 0
    except BaseException as error:  # its text may hold anything
        print(f"the task ended by {type(error).__name__}", file=sys.stderr)
        traceback.print_tb(error.__traceback__)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _owned(content: RecordDict) -> RecordDict:
    """Content whose arrays are copies, and outlive the folder that they came through."""
    for record in content.array_records.values():
        for array in record.values():
            array.data = bytes(array.data)
    return content


def _failure(said: Error, message: Message) -> Message:
    """An answer that says why there is none, in the site's own log too."""
    print(f"error {said.code}: {said.reason}", file=sys.stderr, flush=True)
    return Message(said, reply_to=message)


def _ended(problem: OSError) -> Error:
    """Why a task did not answer: what happened, what to do, and the rule."""
    if isinstance(problem, TimeoutError):
        return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(problem))
    if isinstance(problem, ConnectionError):  # by this code the server asks once more
        text = "the task was killed before it answered; the site should look for a lack of memory (task.killed)"
        return Error(ErrorCode.CLIENT_APP_CRASHED, text)
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, public_reason(problem))


def _wait(pid: int, timeout_s: float) -> None:
    """Wait for a child to end, without taking its exit status."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended: Any = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return
        time.sleep(0.05)
