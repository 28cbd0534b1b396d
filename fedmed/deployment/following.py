"""The events of a run at the server, told to whoever waits for it as they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote

import httpx

from fedmed.deployment.coordinators import Entrance
from fedmed.deployment.run_files import folders, of_series, run_client
from fedmed.types import Event

MOST_BYTES = 1 << 20  # of events at one look; the next one brings the rest
TIMEOUT_S = 30.0


class Following:
    """Asks the server for what `events.jsonl` of a run has grown by."""

    def __init__(self, server: Entrance, tell: Callable[[Event], None]) -> None:
        """Ask for nothing yet.

        Args:
            server: that the run is on.
            tell: called with every event, in order.
        """
        self._server, self._tell = server, tell
        self._folder: str | None = None
        self._read = 0  # bytes

    def __call__(self, series: int) -> None:
        """Tell of the events of a series of runs since the last look. What cannot be had now comes at a later one."""
        with suppress(httpx.HTTPError), run_client(self._server, TIMEOUT_S) as client:
            if self._folder is None:
                self._folder = of_series(folders(client), series)
            if self._folder is None:
                return
            part = f"bytes={self._read}-{self._read + MOST_BYTES - 1}"
            place = f"/files/{quote(self._folder)}/events.jsonl"
            answer = client.get(place, headers={"Range": part, "Accept-Encoding": "identity"})
            if answer.status_code == httpx.codes.PARTIAL_CONTENT:  # there is something from that byte on
                self._take(answer.content)

    def _take(self, content: bytes) -> None:
        whole, newline, _ = content.rpartition(b"\n")  # the last line may be half written
        self._read += len(whole) + len(newline)
        for line in whole.splitlines():
            with suppress(ValueError, KeyError):  # of another version of fedmed, say
                self._tell(json.loads(line))
