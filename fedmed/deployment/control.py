"""What a coordinator asks of the SuperLink: which sites may connect, and which runs there are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.deployment.cards import SiteCard
from fedmed.deployment.coordinators import Entrance
from fedmed.deployment.flower_app import build_app
from fedmed.deployment.node_keys import flower_bytes
from fedmed.deployment.processes import BAD_CERTIFICATE
from fedmed.errors import RunFailed, RunInterrupted

TIMEOUT_S = 30.0
GATEWAY = (502, 503, 504)
TAKEN_OUT = "unregistered"  # Flower's word
NEW_KEY = "its key was taken out before; it has to make a new one: delete keys/node.*, fedmed site keygen"
OWN_WORDS = "ServerApp failed with exception"  # how Flower begins what a run itself said of its failure


class ServerAway(RunFailed):
    """The server does not answer; it may come back."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A site's SuperNode, as the server sees it."""

    number: int
    site: str
    status: str  # registered, online, offline, or TAKEN_OUT
    public_key: bytes


@dataclass(frozen=True, kw_only=True)
class FlowerRun:
    """A run, as Flower sees it."""

    number: int
    series: int  # of which it is one: a run that is continued after its server ended is a new one of the same series
    status: str  # pending, starting, running, or finished:completed, :failed, :stopped
    details: str
    submitted: datetime
    started: datetime | None  # when a process took it up
    finished: datetime | None
    config: Mapping[str, Any] = field(repr=False)  # flat, as it was submitted

    @property
    def ended(self) -> bool:
        """Whether it came to any end."""
        return self.status.startswith("finished")

    @property
    def lost(self) -> bool:
        """Whether the server failed it: its process was gone before it could say how the run ended, or says so."""
        own = self.details.startswith(OWN_WORDS) and not self.details.endswith(RunInterrupted.goes_on)
        return self.status == "finished:failed" and not own


@contextmanager
def control(server: Entrance) -> Iterator[ControlHttpClient]:
    """A connection to the consortium's server.

    Raises:
        ConfigError: a certificate or a key cannot be used.
        ServerAway: the server does not answer.
        RunFailed: it refuses.
    """
    client = ControlHttpClient(
        f"https://{server.address}",
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedmed")],
        verify=server.tls(),
        timeout=TIMEOUT_S,
    )
    if server.near:  # whatever proxy the environment names
        client._client.close()
        client._client = httpx.Client(verify=server.tls(), timeout=TIMEOUT_S, trust_env=False)
    try:
        yield client
    except httpx.RequestError as error:
        if BAD_CERTIFICATE in str(error):  # it may be started again with another
            why = str(error).rpartition("verify failed: ")[2].partition(" (")[0]
            text = f"the server's certificate is refused ({why}); one that ended is renewed by fedmed server provision"
            raise ServerAway(text) from None
        raise ServerAway(f"{server.unanswered} ({type(error).__name__})") from None
    except httpx.HTTPStatusError as error:
        if error.response.status_code in GATEWAY:  # nginx, in front of a SuperLink that is away
            raise ServerAway("the server is being started; wait a little") from None
        raise RunFailed(server.refused(error.response.status_code)) from None
    finally:
        client.close()


def nodes(client: ControlHttpClient) -> list[Node]:
    """The nodes that may connect, by name."""
    return [node for node in _every_node(client) if node.status != TAKEN_OUT]


def taken_out(client: ControlHttpClient, cards: Iterable[SiteCard]) -> list[str]:
    """The sites, of some, whose keys were taken out before, so that Flower takes them no second time."""
    gone = {node.public_key for node in _every_node(client) if node.status == TAKEN_OUT}
    return [card.name for card in cards if flower_bytes(card.node_key) in gone]


def _every_node(client: ControlHttpClient) -> list[Node]:
    found = client.ListNodes(ListNodesRequest()).nodes_info
    return sorted(
        (Node(number=n.node_id, site=n.name, status=n.status, public_key=n.public_key) for n in found),
        key=lambda node: node.site,
    )


def agree(client: ControlHttpClient, cards: Sequence[SiteCard], unknown: Collection[str] = ()) -> list[str]:
    """Let exactly the provisioned sites connect: register those that are new, and take leave of all others.

    Flower takes no key a second time, so that nobody comes back with one that was taken out.

    Args:
        client: of the server.
        cards: of the sites that may connect.
        unknown: names of the sites whose cards are damaged: they stay what they are.

    Returns:
        What was changed, in words, and whose key was taken out before.
    """
    wanted = {flower_bytes(card.node_key): card.name for card in cards}
    said = []
    there = nodes(client)
    for node in there:
        if wanted.get(node.public_key) != node.site and node.site not in unknown:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node.number))
            said.append(f"{node.site} may no longer connect")
    known = {node.public_key for node in there if wanted.get(node.public_key) == node.site}
    for key, name in wanted.items():
        if key not in known:
            try:
                client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
                said.append(f"{name} may connect")
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
                    raise
                said.append(f"{name} may not connect: {NEW_KEY}")
    return said


def submit(client: ControlHttpClient, config: RunConfig) -> int:
    """Start a run.

    Returns:
        Flower's number of it.

    Raises:
        RunFailed: the server took no run.
    """
    return _start(client, run_file.flatten(config), series=None)


def continue_run(client: ControlHttpClient, lost: FlowerRun) -> int:
    """Start a run that goes on where a lost one ended: the same configuration, in the same series.

    Returns:
        Flower's number of it.

    Raises:
        RunFailed: the server took no run.
    """
    return _start(client, lost.config, series=lost.series)


def resume_run(client: ControlHttpClient, number: int) -> int:
    """Go on with a run that paused, failed or was stopped, from its last checkpoint.

    Returns:
        Flower's number of what goes on with it.

    Raises:
        RunFailed: there is no such run, it has not ended, or it is complete.
    """
    run = newest(client, number)
    if not run.ended or run.status == "finished:completed":
        raise RunFailed(f"run {number} is {run.status}; there is nothing to resume")
    return continue_run(client, run)


def runs(client: ControlHttpClient, number: int | None = None) -> list[FlowerRun]:
    """All runs, or one, the oldest first.

    Raises:
        RunFailed: there is no such run.
    """
    request = ListRunsRequest() if number is None else ListRunsRequest(run_id=number)
    try:
        answer = client.ListRuns(request)
    except httpx.HTTPStatusError as error:
        if number is None or error.response.status_code in (httpx.codes.FORBIDDEN, *GATEWAY):
            raise
        raise RunFailed(f"there is no run {number}; fedmed server status lists them") from None
    found = sorted(map(run_from_proto, answer.run_dict.values()), key=lambda run: run.pending_at)
    return [
        FlowerRun(
            number=run.run_id,
            series=run.series_id,
            status=":".join(filter(None, (run.status.status, run.status.sub_status))),
            details=run.status.details,
            submitted=datetime.fromisoformat(run.pending_at),
            started=datetime.fromisoformat(run.starting_at) if run.starting_at else None,
            finished=datetime.fromisoformat(run.finished_at) if run.finished_at else None,
            config=run.override_config,
        )
        for run in found
    ]


def stop_run(client: ControlHttpClient, number: int) -> None:
    """End a run.

    Raises:
        RunFailed: there is no such run, or it has ended.
    """
    if runs(client, number)[0].ended:
        raise RunFailed(f"run {number} has ended already")
    if not client.StopRun(StopRunRequest(run_id=number)).success:
        raise RunFailed(f"run {number} could not be stopped; the server's log says why")


def newest(client: ControlHttpClient, number: int) -> FlowerRun:
    """A run, or the last of those that continued it.

    Raises:
        RunFailed: there is no such run.
    """
    return series_of(client, number)[-1]


def series_of(client: ControlHttpClient, number: int) -> list[FlowerRun]:
    """A run with all that it continued and that continued it, the oldest first.

    Raises:
        RunFailed: there is no such run.
    """
    every = runs(client)
    series = {run.series for run in every if run.number == number}
    if not series:
        raise RunFailed(f"there is no run {number}; fedmed server status lists them")
    return [run for run in every if run.series in series]


def _start(client: ControlHttpClient, config: Mapping[str, Any], series: int | None) -> int:
    content = build_app()
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
        override_config=user_config_to_proto(dict(config)),
        series_id=series,
    )
    answer = client.StartRun(request)
    if not answer.HasField("run_id"):
        raise RunFailed("the server took no run; its log says why")
    return int(answer.run_id)
