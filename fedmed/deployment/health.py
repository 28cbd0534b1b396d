"""GET /health on loopback: whether a site's runner works, for the hospital's own monitoring. It names nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedmed
from fedmed.deployment.site_folder import SiteFolder
from fedmed.errors import ConfigError, FedmedError
from fedmed.privacy import keys as site_keys

PATH = "/health"
RECORDS = ("ledger/ledger.sqlite", "audit.jsonl", "egress.jsonl")


@contextmanager
def health_endpoint(port: int, facts: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Answer on a port of 127.0.0.1 while the block runs: 200 where `facts` says that it is connected, else 503.

    Args:
        port: 0 = answer nowhere.
        facts: what is said, as JSON holds it; `connected` is one of them.

    Raises:
        ConfigError: somebody else uses the port.
    """
    if not port:
        yield
        return

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Say how things are."""
            known = self.path == PATH
            said = dict(facts()) if known else {}
            content = json.dumps(said).encode() + b"\n"
            self.send_response(404 if not known else 200 if said["connected"] else 503)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Log no question."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(f"health-port = {port} cannot be used ({error.strerror}); choose another") from None
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def site_facts(site: SiteFolder, *, up_since: str, connected: bool) -> dict[str, Any]:
    """What a site says of itself.

    Args:
        site: whose records are read.
        up_since: when its runner started, RFC 3339.
        connected: whether its SuperNode has the server.
    """
    versions = {"fedmed": fedmed.__version__} | {name: version(name) for name in ("flwr", "torch")}
    said: dict[str, Any] = {"up_since": up_since, "connected": connected, "versions": versions}
    state = site.state
    stamps = tuple(path.stat().st_mtime_ns if (path := state / name).exists() else 0 for name in RECORDS)
    if site.config.policy is None or not stamps[0]:
        return said | {"last_round": None, "last_refusal": None, "epsilon_left": None, "problem": None}
    try:
        return said | _recorded(state, site.keys / site_keys.PUBLIC, site.config.policy.privacy.epsilon, stamps)
    except FedmedError as error:
        return said | {"last_round": None, "last_refusal": None, "epsilon_left": None, "problem": error.public}


@lru_cache(maxsize=1)
def _recorded(state: Path, public: Path, epsilon: float, stamps: tuple[int, ...]) -> dict[str, Any]:
    """What the site's records say; `stamps` has it read again only when they changed."""
    from fedmed.privacy.verification import examine  # heavy, and not every runner is asked

    found = examine(state, site_keys.read_public(public))
    asked = [record.body for record in found.audit if record.body.get("kind") == "decision"]
    rounds = [body for body in asked if body["allowed"] and body["task"] == "train"]
    refusals = [body for body in asked if not body["allowed"]]
    return {
        "last_round": {key: rounds[-1][key] for key in ("time", "round")} if rounds else None,
        "last_refusal": {key: refusals[-1][key] for key in ("time", "rule")} if refusals else None,
        "epsilon_left": max(epsilon - found.spent.epsilon_rdp, 0.0),
        "problem": "the records have faults; fedmed ledger verify" if found.faults else None,
    }
