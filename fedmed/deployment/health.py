"""GET /health on loopback: whether a site's runner works, for the hospital's own monitoring. It names nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedmed
from fedmed.deployment.site_folder import SiteFolder, read_site_folder
from fedmed.errors import ConfigError, FedmedError
from fedmed.privacy import keys as site_keys

PATH = "/health"
CONFINEMENT = "confinement.json"  # in Flower's folder: what the warm process found
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
    """What a site says of itself, by its site.toml as it is now, which every task reads anew.

    Args:
        site: whose site.toml and records are read.
        up_since: when its runner started, RFC 3339.
        connected: whether its SuperNode has the server.
    """
    wrong: str | None = None
    try:
        site = read_site_folder(site.file)
    except FedmedError:
        wrong = "site.toml is wrong, and every task is refused; fedmed site check"
    versions = {"fedmed": fedmed.__version__} | {name: version(name) for name in ("flwr", "torch")}
    said: dict[str, Any] = {"up_since": up_since, "connected": connected, "versions": versions}
    said["confinement"] = _confinement(site)
    state = site.state
    stamps = tuple(path.stat().st_mtime_ns if (path := state / name).exists() else 0 for name in RECORDS)
    if site.config.policy is None or not stamps[0]:
        return said | {"last_round": None, "last_refusal": None, "epsilon_left": None, "problem": wrong}
    try:
        said |= _recorded(state, site.keys / site_keys.PUBLIC, site.config.policy.privacy.epsilon, stamps)
        return said | {"problem": wrong or said["problem"]}
    except FedmedError as error:
        return said | {"last_round": None, "last_refusal": None, "epsilon_left": None, "problem": wrong or error.public}


def _confinement(site: SiteFolder) -> dict[str, str | None] | None:
    """What a task is kept from, None for what the system does not allow; None before tasks can be made."""
    with suppress(OSError, ValueError):
        held = json.loads((site.flower / CONFINEMENT).read_text(encoding="utf-8"))
        return {what: words or None for what, words in held.items()}
    return None


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
