"""Flower's SuperNode as a site runs it: connected once tasks can be made, and on the server's time.

Flower signs the time of day under every request, and the server refuses one from five seconds ahead or five minutes
ago; an answer ends when its question does. A hospital's clock may be further off than that. So what Flower stamps here
is the server's time, as far as its HTTP `Date` tells it. Policy, ledger and logs stay on the hospital's own clock.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import httpx
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore import date
from flwr.supercore.constant import OBJECT_PUSH_SESSION_TTL_SECONDS
from flwr.supercore.heartbeat import HeartbeatFailure, HeartbeatSender
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedmed.deployment import door
from fedmed.deployment.node_state import keep_answering
from fedmed.deployment.reach import clock_ahead_s
from fedmed.deployment.site_folder import SiteFolder, joined_kit, read_site_folder
from fedmed.errors import ConfigError

CLOSE_S = 2.0  # what the server's whole seconds and the way there leave open
NAP_S = 0.1


def main(site: SiteFolder) -> None:
    """Run `flower-supernode` with the arguments that are left."""
    from flwr.supernode.cli import flower_supernode  # seconds, in which the warm process imports its own

    while not (site.flower / door.SOCKET).exists():  # the runner ends this process when there will be none
        time.sleep(NAP_S)
    try:
        ahead_s = clock_ahead_s(joined_kit(site))
    except ConfigError:  # the server is away; when it comes and refuses, this process is started again
        ahead_s = 0.0
    if abs(ahead_s) > CLOSE_S:
        print(f"this clock is {ahead_s:+.0f} s from the server's, which holds for what is sent; set up NTP")
        os.environ[door.AHEAD] = f"{ahead_s:.3f}"  # for its tasks
        keep_server_time(ahead_s)
    keep_beating()
    keep_pushing()
    keep_answering()
    threading.excepthook = end
    flower_supernode()
    # An error of the server, such as a full disk's, ends the connection. Flower then returns from here, but a thread of
    # its own would keep the process: connected to nothing, for ever. The runner starts another one.
    print("the connection to the server ended", flush=True)
    os._exit(1)


def keep_beating() -> None:
    """Have Flower try a heartbeat again that the server, or a proxy on the way, answers with an error.

    It tries again where there is no answer, or 502 to 504; by any other error the thread that sends them would end.
    """
    once = HeartbeatSender._heartbeat

    def beat(sender: HeartbeatSender) -> None:
        try:
            once(sender)
        except httpx.HTTPStatusError as error:
            raise HeartbeatFailure from error

    HeartbeatSender._heartbeat = beat  # type: ignore[assignment]  # mypy takes the method for an attribute


def keep_pushing() -> None:
    """Have Flower wait for a piece of an update as long as the server keeps its place, and not 30 s as for all else.

    A piece has 5 MB. What a slow line has not carried yet, the buffers of this machine and of a proxy may hold, so that
    it seems sent long before the server can answer.
    """

    def push(client: FleetHttpClient, request: PushObjectRequest) -> PushObjectResponse:
        return client._unary_unary(
            path="/v1/fleet/push-object",
            rpc_method="/flwr.proto.Fleet/PushObject",
            request=request,
            response_type=PushObjectResponse,
            timeout=OBJECT_PUSH_SESSION_TTL_SECONDS,
        )

    FleetHttpClient.PushObject = push  # type: ignore[assignment]  # as above


def end(failed: threading.ExceptHookArgs) -> None:
    """End the process with one of its threads: without heartbeats it goes on asking, and counts as absent for ever."""
    threading.__excepthook__(failed)
    sys.stderr.flush()
    os._exit(1)


def keep_server_time(ahead_s: float) -> None:
    """Have all of Flower in this process take this machine's time less `ahead_s` seconds for the present."""
    own, ahead = date.now, timedelta(seconds=ahead_s)

    def now() -> datetime:
        return own() - ahead

    for module in list(sys.modules.values()):  # which took the function over by name
        if module.__name__.startswith("flwr.") and vars(module).get("now") is own:
            vars(module)["now"] = now


if __name__ == "__main__":
    place = read_site_folder(Path(sys.argv.pop(1)))
    main(place)
