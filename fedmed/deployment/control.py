"""What a coordinator asks of the SuperLink: which sites may connect, and which runs there are."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from fedmed.config import RunConfig, SimulationConfig
from fedmed.deployment.consortium import ServerFolder, joined
from fedmed.deployment.flower_app import build_app
from fedmed.deployment.node_keys import flower_bytes
from fedmed.deployment.provision import site_cards
from fedmed.errors import ConfigError, RunFailed

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what listens there is reached on loopback


@dataclass(frozen=True, kw_only=True)
class Node:
    """A site's SuperNode, as the server sees it."""

    number: int
    site: str
    status: str  # registered, online, offline
    public_key: bytes


@dataclass(frozen=True, kw_only=True)
class FlowerRun:
    """A run, as Flower sees it."""

    number: int
    status: str  # pending, starting, running, or finished:completed, :failed, :stopped
    details: str


@contextmanager
def control(folder: ServerFolder) -> Iterator[ControlHttpClient]:
    """A connection to the consortium's server, on the address that it listens on.

    Raises:
        RunFailed: it does not answer, or refuses.
    """
    listen = folder.consortium.listen
    client = ControlHttpClient.from_server_address(
        server_address=joined(EVERYWHERE.get(listen, listen), folder.consortium.port),
        insecure=False,
        root_certificates=(folder.tls / "ca.crt").read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedmed")],
    )
    try:
        yield client
    except httpx.RequestError as error:
        raise RunFailed(f"the server does not answer ({type(error).__name__}); fedmed server start") from None
    except httpx.HTTPStatusError as error:
        raise RunFailed(f"the server refused ({error.response.status_code}); its log says why") from None
    finally:
        client.close()


def nodes(client: ControlHttpClient) -> list[Node]:
    """The nodes that may connect, by name."""
    found = client.ListNodes(ListNodesRequest()).nodes_info
    kept = [node for node in found if node.status != "unregistered"]
    return sorted(
        (Node(number=n.node_id, site=n.name, status=n.status, public_key=n.public_key) for n in kept),
        key=lambda node: node.site,
    )


def agree(client: ControlHttpClient, folder: ServerFolder) -> list[str]:
    """Let exactly the provisioned sites connect: register those that are new, and take leave of all others.

    Returns:
        What was changed, in words.
    """
    wanted = {flower_bytes(card.node_key): card.name for card in site_cards(folder)}
    said = []
    there = nodes(client)
    for node in there:
        if wanted.get(node.public_key) != node.site:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node.number))
            said.append(f"{node.site} may no longer connect")
    known = {node.public_key for node in there if wanted.get(node.public_key) == node.site}
    for key, name in wanted.items():
        if key not in known:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            said.append(f"{name} may connect")
    return said


def deployable(config: RunConfig, folder: ServerFolder) -> RunConfig:
    """A run file as it is submitted: real hospitals read their own site.toml, so what names data there is left out.

    Raises:
        ConfigError: it asks for what only a simulation can do, or has no labels.
    """
    default, asked = SimulationConfig(), config.simulation
    for key in ("partition", "policy"):
        if getattr(asked, key) != getattr(default, key):
            raise ConfigError(
                f"simulation.{key} is for fedmed simulate; real hospitals have data and policies of their own"
            )
    if not config.task.labels:
        raise ConfigError("task.labels: name the labels; a run without them is the demo, which is simulated")
    names = [card.name for card in site_cards(folder)]
    if len(names) < config.strategy.min_sites:
        least = config.strategy.min_sites
        raise ConfigError(
            f"strategy.min-sites = {least}, but {len(names)} sites are provisioned; fedmed server provision"
        )
    values = run_file.nested(config)
    values["data"]["sites"] = names
    values["simulation"] = run_file.nested(RunConfig())["simulation"]
    return run_file.validate(values)


def submit(client: ControlHttpClient, config: RunConfig) -> int:
    """Start a run.

    Returns:
        Flower's number of it.

    Raises:
        RunFailed: the server took no run.
    """
    content = build_app()
    flat: Mapping[str, Any] = run_file.flatten(config)
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
        override_config=user_config_to_proto(dict(flat)),
    )
    answer = client.StartRun(request)
    if not answer.HasField("run_id"):
        raise RunFailed("the server took no run; its log says why")
    return int(answer.run_id)


def runs(client: ControlHttpClient, number: int | None = None) -> list[FlowerRun]:
    """All runs, or one, the oldest first.

    Raises:
        RunFailed: there is no such run.
    """
    request = ListRunsRequest() if number is None else ListRunsRequest(run_id=number)
    try:
        answer = client.ListRuns(request)
    except httpx.HTTPStatusError:
        if number is None:
            raise
        raise RunFailed(f"there is no run {number}") from None
    found = sorted(map(run_from_proto, answer.run_dict.values()), key=lambda run: run.pending_at)
    return [
        FlowerRun(
            number=run.run_id,
            status=":".join(filter(None, (run.status.status, run.status.sub_status))),
            details=run.status.details,
        )
        for run in found
    ]


def stop_run(client: ControlHttpClient, number: int) -> None:
    """End a run.

    Raises:
        RunFailed: there is no such run, or it has ended.
    """
    if runs(client, number)[0].status.startswith("finished"):
        raise RunFailed(f"run {number} has ended already")
    if not client.StopRun(StopRunRequest(run_id=number)).success:
        raise RunFailed(f"run {number} could not be stopped; the server's log says why")


def finished(client: ControlHttpClient, number: int, every_s: float = 1.0) -> FlowerRun:
    """Wait until a run has ended."""
    while True:
        (run,) = runs(client, number)
        if run.status.startswith("finished"):
            return run
        time.sleep(every_s)
