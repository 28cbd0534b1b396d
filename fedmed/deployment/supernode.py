"""A site's runner: a SuperNode over TLS with the site's own key, started again when it ends."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from fedmed.deployment import certificates, door, node_keys
from fedmed.deployment.health import CONFINEMENT, health_endpoint, site_facts
from fedmed.deployment.kits import Kit
from fedmed.deployment.launcher import LAUNCHER, Launcher
from fedmed.deployment.processes import (
    Child,
    flower_environment,
    free_port,
    log_file,
    program,
    reap,
    runner,
)
from fedmed.deployment.scratch import clear_scratch
from fedmed.deployment.site_folder import SiteFolder, joined_kit
from fedmed.durable import make_private, write_atomically
from fedmed.errors import ConfigError, RunFailed

RESTART_S = 15.0  # the server counts a site that was killed as online for up to a minute
WARM_S = 300.0
REST_S, LONGEST_REST_S = 1.0, 30.0  # half of what a task waits for the warm process at the door
LOOK_S = 0.5
TRY_S = 60.0
WHY = {  # Flower's own exit codes
    302: "its node.key is damaged",
    305: "the server did not let it in: it does not know this site's key, or still counts it as online for a minute; "
    "fedmed site check says which",
    603: "the consortium's certificate is damaged; fedmed site join the kit again",
    606: "the server has another version of Flower; install the same fedmed",
}


def site_command(site: SiteFolder, kit: Kit, port: int) -> list[str]:
    """The SuperNode's command line.

    Args:
        site: whose it is.
        kit: that it joined with.
        port: of loopback, for its own tasks.

    Raises:
        ConfigError: the path of site.toml holds a quotation mark, which Flower cannot take.
    """
    if '"' in str(site.file) or "'" in str(site.file):
        raise ConfigError("the path of site.toml must hold no quotation mark")
    return [
        program("flower-supernode"),
        *("--superlink", kit.address),
        *("--root-certificates", str(site.kit / certificates.AUTHORITY)),
        *("--auth-supernode-private-key", str(site.keys / node_keys.PRIVATE)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f"site={json.dumps(str(site.file))}"),
    ]


def write_door(site: SiteFolder) -> Path:
    """Write the command that leads to the warm process, under every name by which Flower starts a task.

    The server says of which kind a task is, and of most kinds it brings the code. Here all are of one kind.

    Returns:
        Their folder, with Flower's launcher of tasks besides: all that the SuperNode's PATH may name. Whatever stood
        behind it there, Python would start in the place of a door that cannot be executed.
    """
    folder = make_private(site.flower / "bin")
    lead = [sys.executable, "-I", "-S", door.__file__, str(site.flower)]
    for name, words in {
        **dict.fromkeys(TASK_TYPE_TO_COMMAND.values(), lead),
        LAUNCHER: [sys.executable, program(LAUNCHER)],
    }.items():
        path, content = folder / name, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'.encode()
        if not os.access(path, os.X_OK) or path.read_bytes() != content:  # a check as root leaves a site's own alone
            write_atomically(path, content, mode=0o700)
    return folder


def try_door(site: SiteFolder) -> str:
    """Write the door, and execute it under every name as Flower does.

    Returns:
        What was found, in words.

    Raises:
        ConfigError: a name leads to nothing, or elsewhere.
    """
    path = str(write_door(site))
    for name in TASK_TYPE_TO_COMMAND.values():
        try:
            tried = subprocess.run(
                [name, door.TRY],
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=TRY_S,
                check=False,
            )
            said = tried.stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            said = type(error).__name__
        if said != door.HERE:
            raise ConfigError(
                f"flower/bin/{name} cannot be executed ({said or 'it failed'}), and without it no task may start; "
                "put the site's folder on a disk that is not mounted noexec"
            )
    return "every task that Flower starts comes to fedmed"


def start_site(site: SiteFolder, say: Callable[[str], None]) -> None:
    """Take part until SIGTERM or Ctrl-C. A SuperNode that ends by itself is started again after 15 s.

    Raises:
        ConfigError: the site cannot take part like this, or runs already.
        RunFailed: tasks cannot be made.
    """
    kit = joined_kit(site)
    authority = certificates.parse_certificate(kit.certificate)
    wrong = certificates.problem(authority, authority, datetime.now(UTC))
    if wrong:
        raise ConfigError(f"the consortium's certificate cannot be used: {wrong}")
    log = log_file(site.logs, "site", site.config.log_to)
    node: Child | None = None
    rest, due = 0.0, None  # before the process that tasks come from is started again, and when
    since = datetime.now(UTC).isoformat(timespec="seconds")

    def tell(line: str) -> None:
        if site.config.log_to != "journal":  # which gets the log from stderr, and would have each line twice
            with suppress(OSError):  # a full disk
                say(line)
        log.info(line)

    def facts() -> dict[str, Any]:
        return site_facts(site, up_since=since, connected=node is not None and node.running and node.connected)

    with runner(site.flower, "site") as stop, health_endpoint(site.config.health_port, facts):
        try_door(site)
        clear_scratch(site)
        environment, made = _environment(site), False
        own = (sys.executable, "-P", "-m", "fedmed.deployment.node", str(site.file))
        tasks = _warm(site, log)
        try:
            while not stop.is_set():
                words = site_command(site, kit, free_port())[1:]
                node = Child([*own, *words], environment, log)  # it waits for `tasks`
                launcher, lost = Launcher(node.pid), False
                tell(f"{site.config.name} connects to {kit.consortium} at {kit.address}")
                while node.running and not lost and not stop.is_set():
                    made |= (site.flower / door.SOCKET).exists()
                    if not made and not (tasks.running and time.monotonic() < tasks.started + WARM_S):
                        raise RunFailed("the process that tasks come from did not start; logs/site.log says why")
                    if not tasks.running and due is None:  # on a full disk again and again, until there is room
                        rest = rest_s(time.monotonic() - tasks.started, rest)
                        due = time.monotonic() + rest
                        tell(f"the process that tasks come from ended; it is started again in {rest:g} s")
                    if due is not None and time.monotonic() >= due:
                        tasks, due = _warm(site, log), None
                    reap(keep={node.pid, tasks.pid})
                    lost = launcher.gone()
                    stop.wait(LOOK_S)
                if stop.is_set():
                    break
                node.wait(1.0)
                node.end()
                why = "was ended, for what starts its tasks was gone" if lost else f"ended: {_why(node)}"
                tell(f"the SuperNode {why}; again in {RESTART_S:.0f} s")
                stop.wait(RESTART_S)
        finally:
            if node is not None:
                node.end()
            tasks.end()
    tell("stopped")


def rest_s(lived_s: float, before_s: float) -> float:
    """How long the warm process stays away: not at all after a long life, else twice as long as the last time."""
    return 0.0 if lived_s >= WARM_S else min(max(2 * before_s, REST_S), LONGEST_REST_S)


def _why(node: Child) -> str:
    if node.bad_certificate:
        return "the server's certificate is refused; fedmed site check says why, and tell the coordinator"
    code = node.flower_code
    if not code:
        return "it lost the server, or was killed"
    return f"{WHY.get(code, 'logs/site.log says why')} (Flower's exit code {code})"


def _environment(site: SiteFolder) -> dict[str, str]:
    return flower_environment(
        make_private(site.flower), FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.5", PATH=str(write_door(site))
    )


def _warm(site: SiteFolder, log: logging.Logger) -> Child:
    """The process that tasks are forked from; it needs seconds until it is ready for the first."""
    for stale in (door.SOCKET, CONFINEMENT):
        (make_private(site.flower) / stale).unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "fedmed.deployment.warm", str(site.file)]
    return Child(command, flower_environment(site.flower), log)
