"""Messages between the server and the sites: one question to many, with answers in a fixed order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmed.errors import one_line
from fedmed.federated.local_grid import LATE, LocalGrid

GRACE_S = 5.0  # a grid may itself answer for a late site; leave it the time to say so
LOOK_S = 1.0  # for a node that may be there again
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
    valid until the next one is asked for. A site whose process died is asked again; so is one that was cut off while
    its answer was on the way, if its node is there again. One whose node is gone is waited for if it is `needed`,
    until the deadline, and asked again when it is back. All together `retries` times at most, before the deadline: a
    private round that is trained again is charged again. An answer to an earlier question is never pulled: it has
    another number, and its group tells.
    """
    names = sorted(nodes)
    deadline = time.monotonic() + timeout_s + GRACE_S
    spare_s = time_to_pull(grid, len(names))

    def push(sites: Iterable[str]) -> list[str]:
        left_s = max(deadline - GRACE_S - time.monotonic(), 1.0) + spare_s
        return list(grid.push_messages([Message(content, nodes[s], kind, ttl=left_s, group_id=group) for s in sites]))

    for name, number in zip(names, push(names), strict=True):
        reply = await_reply(grid, number, deadline)
        for _ in range(retries):
            crashed, cut = has_code(reply, ErrorCode.CLIENT_APP_CRASHED), has_code(reply, ErrorCode.MESSAGE_UNAVAILABLE)
            if not (crashed or cut or (is_gone(reply) and needed(name))) or time.monotonic() > deadline - GRACE_S:
                break
            until = deadline - GRACE_S if needed(name) else time.monotonic() + LOOK_S
            if not crashed and not await_node(grid, nodes[name].__eq__, until):
                break
            reply = await_reply(grid, push([name])[0], deadline)
        yield name, answer_in(reply, nodes[name], group)


def time_to_pull(grid: Grid, count: int) -> float:
    """Seconds that a question outlives the time for its answer, so that all answers that came in time can be pulled.

    They are pulled one by one, after the last site was waited for, and a SuperLink gives none whose question's time to
    live is over. `LocalGrid` keeps them; it ends who hangs at that time, which is the site's.
    """
    return 0.0 if isinstance(grid, LocalGrid) else 60.0 + 10.0 * count


def is_gone(reply: Message | None) -> bool:
    """Whether the server answers for a node, whose heartbeat has stopped."""
    return has_code(reply, ErrorCode.NODE_UNAVAILABLE)


def has_code(reply: Message | None, code: int) -> bool:
    """Whether a reply is this error of Flower's."""
    return reply is not None and reply.has_error() and reply.error.code == code


def await_node(grid: Grid, wanted: Callable[[int], bool], deadline: float) -> bool:
    """Wait until a node is connected.

    Args:
        grid: that knows who is.
        wanted: whether a node will do, by its number.
        deadline: on the monotonic clock.

    Returns:
        Whether one is; false if it is too late.
    """
    while time.monotonic() < deadline:
        if any(wanted(node.node_id) for node in grid.get_nodes()):
            return True
        time.sleep(0.5)
    return False


def answer_in(reply: Message | None, node: int, group: str) -> RecordDict | str:
    """What a reply holds, or why it holds nothing that counts."""
    if reply is None:
        return LATE
    if reply.has_error():
        return one_line((reply.error.reason or "no reason given")[:LONGEST_REASON])
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
