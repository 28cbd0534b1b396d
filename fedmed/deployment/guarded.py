"""Flower's SuperLink with a door: from other machines only sites' own requests come in.

Flower serves three interfaces on one port: the sites' (Fleet), the coordinator's (Control) and its own tasks'
(Runtime). Control knows no password in Flower's open edition: whoever reaches it starts and stops runs. Here Control
and Runtime answer this machine only, and so do the run folders, which are served beside them. nginx, where it stands
in front, is on this machine; it lets coordinators in whose certificate it has seen, and tells where sites come from.

Flower gives every site a run's whole configuration. What in it names files and code of this machine is left out there.

A run's app is code that this machine runs as the server's user, beside the authority's key. So there is one app: that
of the fedmed which is installed here. A run that names no sites would be the demo's, with phantoms for its patients.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from flwr.common.serde import user_config_from_proto
from flwr.supercore.error import ApiErrorCode, FlowerError

from fedmed.deployment.flower_app import app_hash
from fedmed.deployment.run_files import PLACE, run_server

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
FOR_SITES = "/v1/fleet/"
LONGEST = 16 << 20  # bytes of a request: Flower sends pieces of 5 MB, and apps of at most 10 MB
RUN_STARTERS = ("start_run", "start_automation")  # of Flower's Control interface
FOR_SERVER = ("data.server", "data.dataset", "model.weights")  # files and code of the server, in a run's configuration
FORBIDDEN, TOO_LONG = 403, 413


class SitesOnly:
    """An ASGI application that refuses other machines everything but what sites need, and long requests from any."""

    def __init__(self, app: App, runs: App) -> None:
        """Stand before `app`, and before `runs`, which gives run folders."""
        self._app, self._runs = app, runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it in."""
        path = scope.get("path", "")
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # Flower has no other
            return
        elif path.startswith(FOR_SITES):
            await answer(self._app, scope, receive, send)
        elif from_here(scope):
            await answer(self._runs if path.startswith(f"{PLACE}/") else self._app, scope, receive, send)
        else:
            await refuse(send, FORBIDDEN)


async def answer(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Have a request answered, with 413 if it is too long: Flower reads it whole, before it asks who sent it."""
    taken, begun = 0, False

    async def counted() -> MutableMapping[str, Any]:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= LONGEST else {"type": "http.disconnect"}

    async def sent(message: MutableMapping[str, Any]) -> None:
        nonlocal begun
        if taken <= LONGEST or begun:
            begun = True
            await send(message)

    try:
        await app(scope, counted, sent)
    except Exception:
        if taken <= LONGEST:
            raise
    if taken > LONGEST and not begun:
        await refuse(send, TOO_LONG)


async def refuse(send: Send, status: int) -> None:
    """Answer with a status and nothing else."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def own_app_only(act: Callable[..., Any], app: str) -> Callable[..., Any]:
    """One of Flower's functions that take a request for a run, which now refuses every app but one, and the demo.

    Args:
        act: the function.
        app: SHA-256 of the app.
    """

    def checked(request: Any, *arguments: Any, **options: Any) -> Any:
        run = getattr(request, "start_run_request", request)
        if run.app_spec or hashlib.sha256(run.fab.content).hexdigest() != app:
            text = "the run's app is not that of the fedmed which is installed on the server"
            raise FlowerError(ApiErrorCode.NO_PERMISSIONS, text, public_details=text)
        if not user_config_from_proto(run.override_config).get("data.sites"):
            text = "data.sites is empty: fedmed server submit fills it in, flwr run takes it by --run-config"
            raise FlowerError(ApiErrorCode.INVALID_RUN_CONFIG, text, public_details=text)
        return act(request, *arguments, **options)

    return checked


def without_own_files(act: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's function that gives a site a run, which now leaves out what the server alone needs of its configuration.

    Args:
        act: the function.
    """

    def given(*arguments: Any, **options: Any) -> Any:
        answer = act(*arguments, **options)
        for key in FOR_SERVER:
            answer.run.override_config.pop(key, None)
        return answer

    return given


def from_here(scope: Scope) -> bool:
    """Whether a request comes from this machine: from loopback, or from the very address that it reached."""
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    return address.is_loopback or client[0] == server[0]


def main() -> None:
    """Run `flower-superlink` with the door in place.

    Raises:
        ConfigError: fedmed's own app is not installed.
    """
    import flwr.superlink.main as superlink
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from flwr.superlink.servicer.control import control_handlers
    from flwr.superlink.servicer.fleet import fleet_handlers

    create = superlink.create_app

    def create_guarded(*arguments: Any, **options: Any) -> Any:
        app = create(*arguments, **options)
        app.add_middleware(SitesOnly, runs=run_server(Path(os.environ["FEDMED_RUNS"])))
        return app

    for name in RUN_STARTERS:
        vars(control_handlers)[name] = own_app_only(vars(control_handlers)[name], app_hash())
    fleet_handlers.get_run = without_own_files(fleet_handlers.get_run)
    superlink.create_app = create_guarded
    flower_superlink()


if __name__ == "__main__":
    main()
