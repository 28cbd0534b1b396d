"""A Flower `Grid` on one machine: every node is a function call in a pre-forked worker process.

Workers are forked before any thread pool exists and import nothing afterwards; the network of a worker stays resident
and only its weights are swapped. A worker gets its next message the moment it answers, or a little before, without
polling. Replies may be pulled in any order; those pulled late wait in the spool, on disk.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmed.federated.local_pool import Given, Worker, WorkerPool
from fedmed.federated.local_worker import RUN_ID, question, read_answer, work
from fedmed.federated.spool import Spool

SPOOL_LIMIT = 1 << 30  # bytes of replies that wait to be pulled, above which workers rest; one site may be very slow
LATE = "no answer before the round's deadline"
PULL_WAIT_S = 1.0  # how long a pull waits for a reply before it returns nothing


@dataclass(frozen=True)
class Sent:
    """A message on its way, and the slot that holds its arrays."""

    message: Message
    header: bytes
    slot: str
    deadline: float  # on the monotonic clock: when Flower's time to live ends


@dataclass(frozen=True)
class Reply:
    """An answer that was not pulled yet, or the reason why there is none."""

    header: bytes = b""
    slot: str = ""
    error: Error | None = None
    size: int = 0  # bytes in the slot


class LocalGrid(Grid):
    """Runs a Flower `ClientApp` for many nodes in a few worker processes. Use it as a context manager."""

    def __init__(
        self,
        client: ClientApp,
        nodes: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any],
        *,
        workers: int,
        spool: Path,
        devices: Sequence[str] = ("cpu",),
        spool_limit: int = SPOOL_LIMIT,
    ) -> None:
        """Fork the workers. No thread may have been started in this process yet.

        Args:
            client: the app that answers every message.
            nodes: the node configuration of every node, perhaps with its name; node ids count from 1.
            run_config: the run configuration in every node's context.
            workers: processes; never more than nodes.
            spool: an existing folder for the slots.
            spool_limit: bytes of replies that wait to be pulled, above which only what is being pulled is worked on.
            devices: torch devices, dealt to the workers in turn; a node finds its own in `node_config["device"]`.
        """
        self._client, self._run_config = client, dict(run_config)
        self._nodes = {number: dict(node) for number, node in enumerate(nodes, start=1)}
        self._folder, self._spool = spool, Spool(spool)
        self._ids, self._slots = itertools.count(1), itertools.count(1)
        self._free: list[str] = []
        self._pulled: list[str] = []  # slots that the caller may still be reading
        self._users: Counter[str] = Counter()  # messages that still need the slot of a pushed content
        self._pushed: tuple[RecordDict | None, bytes, str] = (None, b"", "")  # the last content, its header and slot
        self._waiting: deque[str] = deque()
        self._sent: dict[str, Sent] = {}
        self._replies: dict[str, Reply] = {}
        self._spool_limit, self._held = spool_limit, 0  # bytes of replies that wait
        self._wanted: set[str] = set()  # messages that are being pulled
        self._run = Run.create_empty(RUN_ID)
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = RUN_ID
        self._pool = WorkerPool(self._work, devices, max(1, min(workers, len(self._nodes))))

    def __enter__(self) -> LocalGrid:
        """The grid itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End the workers."""
        self.close()

    def close(self) -> None:
        """End every worker process, at once and by its pid."""
        self._pool.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return self._pool.pids

    # Flower's interface.

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message; the same as Flower's `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; on one machine they are always there."""
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The same with their names, so that who dies before it says its name is known by it."""
        return [NodeInfo(node_id=node, name=str(self._nodes[node].get("name", ""))) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages and start idle workers on them. Content shared by several messages is written once."""
        ids = []
        for message in messages:
            header, slot = self._written(message.content)
            number = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = number
            self._sent[number] = Sent(message, header, slot, time.monotonic() + message.metadata.ttl)
            self._users[slot] += 1
            self._waiting.append(number)
            ids.append(number)
        self._dispatch()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there, waiting up to a second for the first. Their arrays are valid until the next pull.

        A message that outlives its time to live is answered by an error, and the worker that hangs on it is ended.
        """
        self._free += self._pulled
        self._pulled = []
        wanted = [number for number in message_ids if number in self._sent]
        self._prefer(wanted)
        until = time.monotonic() + PULL_WAIT_S
        while wanted and not any(number in self._replies for number in wanted):
            self._expire()
            first = min((self._sent[number].deadline for number in wanted), default=until)
            if not self._receive(min(until, first) - time.monotonic()) and time.monotonic() >= until:
                break
        return [self._open(number) for number in wanted if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not offered: it would hold every reply in memory at once."""
        raise NotImplementedError("push messages and pull the replies one by one")

    # One machine.

    def _open(self, number: str) -> Message:
        reply, sent = self._replies.pop(number), self._sent.pop(number)
        self._held -= reply.size
        if reply.error is not None:
            return Message(reply.error, reply_to=sent.message)
        self._pulled.append(reply.slot)
        return Message(self._spool.read(reply.header), reply_to=sent.message)

    def _prefer(self, wanted: Sequence[str]) -> None:
        """What is being pulled is worked on next, however full the spool is."""
        for number in reversed(wanted):
            if number in self._waiting:
                self._waiting.remove(number)
                self._waiting.appendleft(number)
        self._wanted = set(wanted)
        self._dispatch()

    def _written(self, content: RecordDict) -> tuple[bytes, str]:
        """The header and slot of a content, writing it if it is not the one written last."""
        if content is not self._pushed[0]:
            old = self._pushed[2]
            if old and not self._users[old]:
                self._free.append(old)
            slot = self._slot()
            self._pushed = (content, self._spool.write(slot, content), slot)
        return self._pushed[1], self._pushed[2]

    def _slot(self) -> str:
        return self._free.pop() if self._free else f"slot-{next(self._slots)}"

    def _work(self, channel: socket.socket, device: str) -> None:
        work(channel, self._client, self._nodes, self._run_config, self._folder, device)

    def _dispatch(self) -> None:
        """Give every worker that has room a message."""
        for worker in self._pool:
            full = self._held >= self._spool_limit
            if self._waiting and worker.has_room and (not full or self._waiting[0] in self._wanted):
                given = Given(self._waiting.popleft(), self._slot())
                sent = self._sent[given.number]
                self._pool.give(worker, given, question(sent.message, sent.header, given.slot))

    def _receive(self, timeout_s: float) -> bool:
        """Wait for one worker to answer or to die; False when none did in time."""
        heard = False
        for worker, data in self._pool.answers(timeout_s):
            heard = True
            if data:
                said = read_answer(data)
                self._answered(self._pool.finished(worker, well=not isinstance(said, Error)), said)
            else:
                self._replace(worker)
        self._dispatch()
        return heard

    def _answered(self, given: Given, said: bytes | Error) -> None:
        if isinstance(said, Error):
            self._free.append(given.slot)
            self._settle(given.number, Reply(error=said))
        else:
            self._settle(given.number, Reply(header=said, slot=given.slot, size=int(json.loads(said)["size"])))

    def _settle(self, number: str, reply: Reply) -> None:
        self._replies[number] = reply
        self._held += reply.size
        slot = self._sent[number].slot
        self._users[slot] -= 1
        if not self._users[slot] and slot != self._pushed[2]:
            self._free.append(slot)

    def _replace(self, worker: Worker, error: Error | None = None) -> None:
        """Replace a worker that died or hangs: its first message failed, a second one goes back into the queue."""
        status = self._pool.replace(worker)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        died = Error(ErrorCode.CLIENT_APP_CRASHED, f"the worker process {how}")
        for place, given in enumerate(worker.given):
            self._free.append(given.slot)
            if place == 0:
                self._settle(given.number, Reply(error=error or died))
            else:
                self._waiting.appendleft(given.number)

    def _expire(self) -> None:
        """Answer for messages whose time to live is over, and end the workers that hang on them."""
        now = time.monotonic()
        late = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, LATE)
        for worker in list(self._pool):
            if worker.given and self._sent[worker.given[0].number].deadline <= now:
                self._replace(worker, late)
        for number in [number for number in self._waiting if self._sent[number].deadline <= now]:
            self._waiting.remove(number)
            self._settle(number, Reply(error=late))
