"""The worker processes of one machine: forked, spoken to over a socket each, replaced when they die."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedmed.federated.local_fork_server import ForkServer, Life
from fedmed.federated.local_worker import HEADER_LIMIT, channel_pair

QUICK_S = 0.05  # a worker whose tasks take less is sent one ahead, so that it need not wait for the next


class Given(NamedTuple):
    """A message that a worker has, and the slot for its answer."""

    number: str
    slot: str


@dataclass(eq=False)
class Worker:
    """One worker process and what it was given; it works on the first."""

    pid: int
    channel: socket.socket
    device: str
    given: deque[Given] = field(default_factory=deque)
    since: float = 0.0  # when it began with the first, on the monotonic clock
    quick: bool = False  # whether its last task was, and went well: who fails at once is sent none ahead

    @property
    def has_room(self) -> bool:
        """Whether it should be given a message now."""
        return not self.given or (self.quick and len(self.given) < 2)


class WorkerPool:
    """Worker processes of equal rank. No thread may have been started in this process before it is made."""

    def __init__(self, life: Life, devices: Sequence[str], count: int) -> None:
        """Fork `count` workers that live `life(channel, device)`, devices dealt in turn."""
        self._fork_server = ForkServer(life)
        self._selector = selectors.DefaultSelector()
        self._workers: list[Worker] = []
        for number in range(count):
            self._workers.append(self._fork(devices[number % len(devices)]))

    def __iter__(self) -> Iterator[Worker]:
        """The workers, idle ones first."""
        return iter(sorted(self._workers, key=lambda worker: len(worker.given)))

    def close(self) -> None:
        """End every worker process, at once and by its pid."""
        self._fork_server.close()
        for worker in self._workers:
            worker.channel.close()
        self._workers.clear()
        self._selector.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return tuple(worker.pid for worker in self._workers)

    def give(self, worker: Worker, given: Given, data: bytes) -> None:
        """Send a worker a message."""
        if not worker.given:
            worker.since = time.monotonic()
        worker.given.append(given)
        with contextlib.suppress(OSError):  # a worker that is gone is noticed when its channel is read
            worker.channel.sendall(data)

    def answers(self, timeout_s: float) -> Iterator[tuple[Worker, bytes]]:
        """What workers answer, waiting for the first; b"" from one that died."""
        for key, _ in self._selector.select(max(timeout_s, 0)):
            worker: Worker = key.data
            try:
                data = worker.channel.recv(HEADER_LIMIT)
            except ConnectionError:
                data = b""
            yield worker, data  # a worker's end of the channel closes with it

    def finished(self, worker: Worker, *, well: bool) -> Given:
        """Note that a worker is done with its first message, and whether that went well."""
        now = time.monotonic()
        worker.quick, worker.since = well and now - worker.since < QUICK_S, now
        return worker.given.popleft()

    def replace(self, worker: Worker) -> int:
        """End a worker, fork another in its place, and return the exit status of the first."""
        status = self._fork_server.end(worker.pid)
        self._selector.unregister(worker.channel)
        worker.channel.close()
        place = self._workers.index(worker)
        self._workers.remove(worker)
        self._workers.insert(place, self._fork(worker.device))
        return status

    def _fork(self, device: str) -> Worker:
        ours, theirs = channel_pair()
        with theirs:
            pid = self._fork_server.fork(theirs, device)
        worker = Worker(pid, ours, device)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker
