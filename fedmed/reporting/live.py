"""`fedmed report --live RUN`: a page on this machine that follows a run's `events.jsonl` while it grows.

The server listens on the loopback address alone, answers three paths and only reads. A browser that was sent here under
another host's name (DNS rebinding) is refused.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from plotly.offline import get_plotlyjs

from fedmed.errors import DataError
from fedmed.reporting.facts import usual_primary
from fedmed.reporting.pages import fill
from fedmed.reporting.read import read_settings
from fedmed.reporting.values import count_of, mapping_of, text_of
from fedmed.reporting.words import title

HOST = "127.0.0.1"
MOST_BYTES = 1 << 20  # of events in one answer; a browser asks again for the rest


def live_server(run: Path, *, port: int = 0) -> ThreadingHTTPServer:
    """A server on the loopback address that follows a run; call its `serve_forever`, and `server_close` at the end.

    Args:
        run: a run folder, before, while or after the run writes to it.
        port: 0 = any that is free.

    Raises:
        DataError: there is no run in the folder, or the port is taken.
    """
    if not (run / "run.toml").is_file():
        raise DataError(f"'{run.resolve().name}' holds no run.toml, so there is no run to follow. Give its run folder.")
    page = live_page(run).encode("utf-8")

    class Follower(BaseHTTPRequestHandler):
        """Answers a browser on this machine."""

        def do_GET(self) -> None:  # the standard library's name
            """The page, the events from a byte on, or the finished report."""
            mine = self.connection.getsockname()[1]
            if self.headers.get("Host") not in (f"{HOST}:{mine}", f"localhost:{mine}"):
                self._answer(HTTPStatus.FORBIDDEN, b"this page is for this machine", "text/plain")
                return
            asked = urlsplit(self.path)
            if asked.path == "/":
                self._answer(HTTPStatus.OK, page, "text/html; charset=utf-8")
            elif asked.path == "/events":
                start = parse_qs(asked.query).get("from", ["0"])[0]
                body = json.dumps(events_from(run, int(start) if start.isdecimal() else 0)).encode("utf-8")
                self._answer(HTTPStatus.OK, body, "application/json")
            elif asked.path == "/report.html" and (run / "report.html").is_file():
                self._answer(HTTPStatus.OK, (run / "report.html").read_bytes(), "text/html; charset=utf-8")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"not found", "text/plain")

        def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a line a second helps nobody."""

    try:
        return ThreadingHTTPServer((HOST, port), Follower)
    except OSError as error:
        raise DataError(
            f"port {port} cannot be listened on ({error.strerror}). Give another one with --port."
        ) from None


def events_from(run: Path, start: int) -> dict[str, object]:
    """The whole lines of `events.jsonl` from a byte on.

    Args:
        run: a run folder.
        start: where the last answer ended; 0 at first, and again where the file has become shorter.

    Returns:
        `events`, in order, damaged lines left out; `next`, the byte to ask from; `report`, whether there is one.
    """
    events: list[object] = []
    try:
        with (run / "events.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(start if start <= size else 0)
            start = file.tell()
            whole, newline, _ = file.read(MOST_BYTES).rpartition(b"\n")  # the last line may be half written
    except OSError:
        return {"events": [], "next": start, "report": False}
    for line in whole.split(b"\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        events += [event] if isinstance(event, dict) else []
    return {
        "events": events,
        "next": start + len(whole) + len(newline),
        "report": (run / "report.html").is_file() and any(map(_ends, events)),
    }


def live_page(run: Path) -> str:
    """The page that a browser keeps open."""
    config = read_settings(run / "run.toml", [])
    primary = text_of(mapping_of(config.get("evaluate")).get("primary"))
    if not primary:
        primary = usual_primary(text_of(mapping_of(config.get("task")).get("kind")))
    facts = {
        "rounds": count_of(mapping_of(config.get("train")).get("rounds")) or 0,
        "primary": primary,
        "title": title(primary),
    }
    name = text_of(config.get("name")) or run.resolve().name
    return fill("live.html.j2", name=name, facts=facts, plotly_js=get_plotlyjs())


def _ends(event: object) -> bool:
    return isinstance(event, dict) and event.get("kind") == "run_finished"
