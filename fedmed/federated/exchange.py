"""Messages between the server and the sites: who is there, and one question to many with answers in a fixed order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

import fedmed
from fedmed.federated.identity import package_hash
from fedmed.types import Scalar

LATE = "no answer before the round's deadline"
GRACE_S = 5.0  # a grid may itself answer for a late site; leave it the time to say so


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site as the server knows it."""

    name: str
    node: int
    patients: int
    images: int
    held_out_patients: int
    unreadable: int  # images that were left out
    reasons: str  # why, and how many for each reason


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
) -> Iterator[tuple[str, RecordDict | str]]:
    """Send one content to many sites and yield (site, answer or reason for none), in the order of the sites' names.

    Answers are pulled one by one in that order, so that sums do not depend on who is fast, and one answer is in memory
    at a time; others wait where they are: in the local spool, or in the SuperLink's database. An answer's arrays are
    valid until the next one is asked for. A site whose process died is asked again, `retries` times at most.
    """
    names = sorted(nodes)
    deadline = time.monotonic() + timeout_s + GRACE_S

    def push(sites: Iterable[str]) -> list[str]:
        left_s = max(deadline - GRACE_S - time.monotonic(), 1.0)
        return list(grid.push_messages([Message(content, nodes[s], kind, ttl=left_s, group_id=group) for s in sites]))

    for name, number in zip(names, push(names), strict=True):
        reply = _await(grid, number, deadline)
        left = retries
        while left and reply is not None and reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_CRASHED:
            left -= 1
            reply = _await(grid, push([name])[0], deadline)
        if reply is None:
            yield name, LATE
        elif reply.has_error():
            yield name, reply.error.reason or "no reason given"
        else:
            yield name, reply.content


def _await(grid: Grid, number: str, deadline: float) -> Message | None:
    """Wait for one reply, asking less and less often; a grid that waits by itself is asked at once."""
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


def greet(
    grid: Grid, hello: RecordDict, nodes: Iterable[int], *, timeout_s: float
) -> tuple[list[Member], list[Failure]]:
    """Ask nodes who they are.

    Returns:
        The sites that can take part, and those that cannot with the reason: another version of fedmed, data that
        cannot be used, or a name that is taken.
    """
    members: dict[str, Member] = {}
    failures: list[Failure] = []
    asked = {f"node-{number}": node for number, node in enumerate(nodes, start=1)}
    for label, answer in ask(grid, hello, "query.hello", asked, group="hello", timeout_s=timeout_s):
        if isinstance(answer, str):
            failures.append(Failure(site=label, reason=answer))
            continue
        card = cast(Mapping[str, Scalar], cast(ConfigRecord, answer["card"]))
        name = str(card["site"])
        if card["problem"]:
            failures.append(Failure(site=name, reason=str(card["problem"])))
        elif (card["version"], card["code"]) != (fedmed.__version__, package_hash()):
            reason = f"runs fedmed {card['version']} with other code than the server's {fedmed.__version__}"
            failures.append(Failure(site=name, reason=reason))
        elif name in members:
            failures.append(Failure(site=name, reason="two nodes have this name"))
        else:
            members[name] = Member(
                name=name,
                node=asked[label],
                patients=int(card["patients"]),
                images=int(card["images"]),
                held_out_patients=int(card["held-out-patients"]),
                unreadable=int(card["unreadable"]),
                reasons=str(card["reasons"]),
            )
    return [members[name] for name in sorted(members)], failures
