"""The process that forks the workers of one machine, those that replace others too.

It is forked itself before its parent starts a thread or touches CUDA, and does nothing but wait. So a worker that is
forked late in a run inherits neither: after a fork CUDA cannot be used again, and a lock that a thread held stays held.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from fedmed.errors import RunFailed
from fedmed.federated.local_worker import end_with_parent

LONGEST = 256  # bytes of a request, or of an answer

Life = Callable[[socket.socket, str], None]


class ForkServer:
    """Forks workers whenever it is asked to. No thread may have been started in this process before it is made."""

    def __init__(self, life: Life) -> None:
        """Fork the process itself; its workers will live `life(channel, device)`."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, self._channel, life), daemon=True
        )
        self._process.start()
        theirs.close()

    def fork(self, channel: socket.socket, device: str) -> int:
        """Fork a worker and return its process id.

        Args:
            channel: the worker's end of its channel; this process may close its own copy afterwards.
            device: that the worker is to use.

        Raises:
            RunFailed: the process that forks is gone.
        """
        return self._ask(f"fork {device}", channel)

    def end(self, pid: int) -> int:
        """Kill a worker and return its exit status: minus the signal's number if a signal ended it, now or before.

        Raises:
            RunFailed: the process that forks is gone.
        """
        return self._ask(f"end {pid}")

    def close(self) -> None:
        """End all workers and then the process itself."""
        with suppress(OSError):  # it is gone
            self._channel.shutdown(socket.SHUT_RDWR)  # for whoever was forked since and holds a copy, too
        self._channel.close()
        self._process.join()

    def _ask(self, request: str, *channels: socket.socket) -> int:
        try:
            socket.send_fds(self._channel, [request.encode()], [channel.fileno() for channel in channels])
            answer = self._channel.recv(LONGEST)
        except ConnectionError:
            answer = b""
        if not answer:
            raise RunFailed("the process that starts workers is gone, perhaps for want of memory; resume the run")
        return int(answer)


def _serve(asked: socket.socket, other: socket.socket, life: Life) -> None:
    """Fork and end workers as asked, until the parent is gone or closes its end; then no worker is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    other.close()
    workers: set[int] = set()
    while True:
        request, descriptors, _, _ = socket.recv_fds(asked, LONGEST, 1)
        if not request:
            break
        what, _, value = request.decode().partition(" ")
        if what == "fork":
            with socket.socket(fileno=descriptors[0]) as channel:
                answer = os.fork()
                if answer == 0:
                    asked.close()
                    _live(life, channel, value)
            workers.add(answer)
        else:
            workers.discard(int(value))
            answer = _ended(int(value))
        asked.sendall(str(answer).encode())
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    for pid in workers:
        os.waitpid(pid, 0)


def _live(life: Life, channel: socket.socket, device: str) -> NoReturn:
    try:
        life(channel, device)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()  # a file, in an experiment
        os._exit(1)
    os._exit(0)


def _ended(pid: int) -> int:
    """Kill a child, unless it has ended already, and take its exit status."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
