"""The consortium's server: a SuperLink with TLS, registered keys and a database, for the provisioned sites alone."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from fedmed.deployment import certificates
from fedmed.deployment.consortium import ServerFolder
from fedmed.deployment.control import agree, control, nodes
from fedmed.deployment.files import make_folder
from fedmed.deployment.processes import Child, Stop, flower_environment, log_file, program, runner, wait_until
from fedmed.errors import ConfigError, RunFailed

START_S = 300.0  # on a busy machine importing Flower takes a while
LOOK_S = 2.0  # between two looks at the list of sites


def server_command(folder: ServerFolder) -> list[str]:
    """The SuperLink's command line."""
    program("flower-superexec")  # it starts the server's tasks
    tls, consortium = folder.tls, folder.consortium
    return [
        *(sys.executable, "-m", "fedmed.deployment.guarded"),
        *("--host", consortium.listen, "--port", str(consortium.port)),
        *("--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key")),
        *("--ssl-ca-certfile", str(tls / "ca.crt")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(folder.flower / "superlink.db")),
    ]


def require_usable(folder: ServerFolder) -> None:
    """Check what can be checked before anything is started.

    Raises:
        ConfigError: nothing is provisioned, a certificate is no good now, or others may read a key.
    """
    if not (folder.tls / "server.crt").exists():
        raise ConfigError("nothing is provisioned yet; fedmed server provision consortium.toml CARD…")
    authority = certificates.read_certificate(folder.tls / "ca.crt")
    certificate = certificates.read_certificate(folder.tls / "server.crt")
    wrong = certificates.problem(certificate, authority, datetime.now(UTC))
    if wrong:
        raise ConfigError(f"the server's certificate cannot be used: {wrong}; fedmed server provision renews it")
    for key in (folder.tls / "server.key", folder.tls / "ca.key", folder.coordinator / "signing.key"):
        if key.exists() and stat.S_IMODE(key.stat().st_mode) & 0o077:
            raise ConfigError(f"{key} can be read by others on this machine; chmod 600 it")


def start_server(folder: ServerFolder, say: Callable[[str], None]) -> None:
    """Run the server until SIGTERM or Ctrl-C. Sites that are provisioned meanwhile may connect at once.

    Raises:
        ConfigError: it cannot be started like this, or runs already.
        RunFailed: the SuperLink ended by itself. Start it again: it keeps registrations, and sites come back.
    """
    require_usable(folder)
    environment = flower_environment(
        make_folder(folder.flower), FEDMED_RUNS=str(folder.runs), FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.5"
    )
    log = log_file(folder.root / "logs", "server")
    with runner(folder.flower, "server") as stop:
        link = Child(server_command(folder), environment, log)
        try:
            if not wait_until(lambda: not link.running or _answers(folder), stop, START_S):
                if not stop.is_set():
                    raise RunFailed(f"the server did not answer within {START_S:.0f} s; logs/server.log says why")
                return
            if not link.running:
                raise RunFailed("the server ended at once; logs/server.log says why (is the port taken?)")
            say(f"serving {folder.consortium.name} on {folder.consortium.listen}:{folder.consortium.port} over TLS")
            _serve(folder, link, stop, say)
        finally:
            link.end()
    say("stopped")


def _serve(folder: ServerFolder, link: Child, stop: Stop, say: Callable[[str], None]) -> None:
    seen: object = None
    while not stop.is_set():
        listed = sorted((path.name, path.stat().st_mtime_ns) for path in folder.cards.glob("*.json"))
        if listed != seen:
            with control(folder) as client:
                for line in agree(client, folder):
                    say(line)
            seen = listed
        stop.wait(LOOK_S)
        if not stop.is_set() and not link.running:
            raise RunFailed("the SuperLink ended by itself; logs/server.log says why. Start the server again")


def _answers(folder: ServerFolder) -> bool:
    try:
        with control(folder) as client:
            nodes(client)
    except RunFailed:
        return False
    return True
