"""Messages between the server and the sites: one question to many, with answers in a fixed order."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

LATE = "no answer before the round's deadline"
GRACE_S = 5.0  # a grid may itself answer for a late site; leave it the time to say so
LONGEST_REASON = 500  # characters of what a site says of its failure


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A site that did not do its part, and why."""

    site: str
    reason: str


def ask(
    grid: Grid,
    content: RecordDict,
    kind: str,
    nodes: Mapping[str, int],
    *,
    group: str,
    timeout_s: float,
    retries: int = 0,
    needed: Callable[[str], bool] = lambda site: False,
) -> Iterator[tuple[str, RecordDict | str]]:
    """Send one content to many sites and yield (site, answer or reason for none), in the order of the sites' names.

    Answers are pulled one by one in that order, so that sums do not depend on who is fast, and one answer is in memory
    at a time; others wait where they are: in the local spool, or in the SuperLink's database. An answer's arrays are
    valid until the next one is asked for. A site whose process died is asked again, `retries` times at most. One whose
    node is gone is waited for if it is `needed`, until the deadline, and asked again when it is back. An answer to an
    earlier question is never pulled: it has another number, and its group tells.
    """
    names = sorted(nodes)
    deadline = time.monotonic() + timeout_s + GRACE_S

    def push(sites: Iterable[str]) -> list[str]:
        left_s = max(deadline - GRACE_S - time.monotonic(), 1.0)
        return list(grid.push_messages([Message(content, nodes[s], kind, ttl=left_s, group_id=group) for s in sites]))

    for name, number in zip(names, push(names), strict=True):
        reply = await_reply(grid, number, deadline)
        left = retries
        while reply is not None and reply.has_error():
            if left and reply.error.code == ErrorCode.CLIENT_APP_CRASHED:
                left -= 1
            elif not (is_gone(reply) and needed(name) and await_nodes(grid, [nodes[name]], deadline - GRACE_S)):
                break
            reply = await_reply(grid, push([name])[0], deadline)
        yield name, answer_in(reply, nodes[name], group)


def is_gone(reply: Message | None) -> bool:
    """Whether the server answers for a node, whose heartbeat has stopped."""
    return reply is not None and reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def await_nodes(grid: Grid, nodes: Collection[int], deadline: float) -> set[int]:
    """Wait until one of these nodes is connected.

    Args:
        grid: that knows who is.
        nodes: by number.
        deadline: on the monotonic clock.

    Returns:
        Those of them that are connected; none if it is too late.
    """
    while time.monotonic() < deadline:
        if back := set(nodes) & {node.node_id for node in grid.get_nodes()}:
            return back
        time.sleep(0.5)
    return set()


def answer_in(reply: Message | None, node: int, group: str) -> RecordDict | str:
    """What a reply holds, or why it holds nothing that counts."""
    if reply is None:
        return LATE
    if reply.has_error():
        return " ".join((reply.error.reason or "no reason given")[:LONGEST_REASON].split())
    if (reply.metadata.src_node_id, reply.metadata.group_id) != (node, group):
        return "the answer is of another round or of another node"
    return reply.content


def await_reply(grid: Grid, number: str, deadline: float) -> Message | None:
    """Wait for one reply, asking less and less often; a grid that waits by itself is asked at once.

    Args:
        grid: that the message was pushed to.
        number: of the message.
        deadline: on the monotonic clock; the grid is asked once even after it.
    """
    pause = 0.005
    while True:
        asked = time.monotonic()
        replies = list(grid.pull_messages([number]))
        if replies:
            return replies[0]
        now = time.monotonic()
        if now >= deadline:
            return None
        time.sleep(max(0.0, min(pause - (now - asked), deadline - now)))
        pause = min(pause * 1.3, 1.0)
