"""Flower's SuperLink with a door: from other machines only sites' own requests come in.

Flower serves three interfaces on one port: the sites' (Fleet), the coordinator's (Control) and its own tasks'
(Runtime). Control knows no password in Flower's open edition: whoever reaches it starts and stops runs. Here Control
and Runtime answer this machine only, and so do the run folders, which are served beside them. nginx, where it stands
in front, is on this machine; it lets coordinators in whose certificate it has seen, and tells where sites come from.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fedmed.deployment.run_files import PLACE, run_server

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
FOR_SITES = "/v1/fleet/"


class SitesOnly:
    """An ASGI application that refuses other machines everything but what sites need, with 403."""

    def __init__(self, app: App, runs: App) -> None:
        """Stand before `app`, and before `runs`, which gives run folders."""
        self._app, self._runs = app, runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it in."""
        path = scope.get("path", "")
        if scope["type"] == "lifespan" or path.startswith(FOR_SITES):
            await self._app(scope, receive, send)
        elif from_here(scope):
            await (self._runs if path.startswith(f"{PLACE}/") else self._app)(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})


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
    """Run `flower-superlink` with the door in place."""
    import flwr.superlink.main as superlink
    from flwr.superlink.cli.flower_superlink import flower_superlink

    create = superlink.create_app

    def create_guarded(*arguments: Any, **options: Any) -> Any:
        app = create(*arguments, **options)
        app.add_middleware(SitesOnly, runs=run_server(Path(os.environ["FEDMED_RUNS"])))
        return app

    superlink.create_app = create_guarded
    flower_superlink()


if __name__ == "__main__":
    main()
