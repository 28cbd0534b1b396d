"""The other end of `LocalGrid`: what a worker process does between its fork and its end, and how it is spoken to.

A question is a line of JSON and the header of a content, whose arrays lie in the spool; so is an answer, after a line
that says `reply`. An error is a line `error`, its code and its reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedmed.federated.client_app import public_reason
from fedmed.federated.spool import Spool

HEADER_LIMIT = 1 << 20  # bytes; headers hold no arrays
RUN_ID = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def work(
    channel: socket.socket,
    client: Callable[[Message, Context], Message],
    nodes: Mapping[int, Mapping[str, Any]],
    run_config: Mapping[str, Any],
    folder: Path,
    device: str,
) -> None:
    """A worker's life: read a message, call the app, answer; end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    keep_freed_memory()
    spool = Spool(folder)
    while True:
        try:
            data = channel.recv(HEADER_LIMIT)
        except ConnectionError:
            return
        if not data:
            return
        first, _, header = data.partition(b"\n")
        envelope = json.loads(first)
        message = Message(spool.read(header), envelope["node"], envelope["type"], group_id=envelope["group"])
        message.metadata.__dict__["_message_id"] = envelope["id"]
        node = envelope["node"]
        context = Context(RUN_ID, node, {**nodes[node], "device": device}, RecordDict(), dict(run_config))
        try:
            reply = client(message, context)
            said = reply.error if reply.has_error() else spool.write(envelope["slot"], reply.content)
        except Exception as error:  # an app's own exception is its node's failure, not the worker's end
            reason = public_reason(error) if isinstance(error, OSError) else type(error).__name__
            said = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        try:
            channel.sendall(answer(said))
        except ConnectionError:  # the grid was closed while this worker was busy
            return


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a channel that takes a question or an answer at once."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, HEADER_LIMIT)
    return ends


def question(message: Message, header: bytes, slot: str) -> bytes:
    """A message as `work` reads it.

    Args:
        message: whose content lies in the spool.
        header: of that content.
        slot: of the spool, for the content of the answer.
    """
    about = message.metadata
    known = {"id": about.message_id, "node": about.dst_node_id, "type": about.message_type, "group": about.group_id}
    return json.dumps({**known, "slot": slot}).encode() + b"\n" + header


def answer(said: bytes | Error) -> bytes:
    """What `work` says: the header of an answer's content, or the error in its place."""
    if isinstance(said, Error):
        return f"error\n{said.code} {said.reason}".encode(errors="replace")  # a file's name may be no text
    return b"reply\n" + said


def read_answer(data: bytes) -> bytes | Error:
    """The inverse of `answer`."""
    kind, _, body = data.partition(b"\n")
    if kind != b"error":
        return body
    code, _, reason = body.decode().partition(" ")
    return Error(int(code), reason)


def keep_freed_memory() -> None:
    """Have glibc keep what training frees, in pieces of up to 16 MiB, for the next step.

    It would give every large activation back to the kernel and fault it in again, a quarter of a U-Net's step. The
    peak is not touched: the next step needs the same memory again. Whole networks go back.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no mallopt, or another one
        c_library = ctypes.CDLL(None)
        c_library.mallopt(M_MMAP_THRESHOLD, 16 << 20)
        c_library.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent is killed, however that happens; elsewhere its channel tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
