"""Flower's SuperLink with a door: from other machines only sites' own requests come in.

Flower serves three interfaces on one port: the sites' (Fleet), the coordinator's (Control) and its own tasks'
(Runtime). Control knows no password in Flower's open edition: whoever reaches it starts and stops runs. Here Control
and Runtime answer this machine only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
FOR_SITES = "/v1/fleet/"


class SitesOnly:
    """An ASGI application that refuses other machines everything but what sites need, with 403."""

    def __init__(self, app: App) -> None:
        """Stand before `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it in."""
        if scope["type"] == "lifespan" or scope.get("path", "").startswith(FOR_SITES) or from_here(scope):
            await self._app(scope, receive, send)
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
        app.add_middleware(SitesOnly)
        return app

    superlink.create_app = create_guarded
    flower_superlink()


if __name__ == "__main__":
    main()
