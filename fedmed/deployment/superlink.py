"""The consortium's server: a SuperLink with TLS, registered keys and a database, for the provisioned sites alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from cryptography import x509

from fedmed.deployment import certificates
from fedmed.deployment.consortium import ServerFolder, joined
from fedmed.deployment.continuing import continue_lost, under_way
from fedmed.deployment.control import FlowerRun, agree, control, nodes, runs
from fedmed.deployment.coordinators import own_entrance
from fedmed.deployment.files import stamps
from fedmed.deployment.kits import SIGNING
from fedmed.deployment.launcher import LAUNCHER, Launcher
from fedmed.deployment.processes import (
    Child,
    Stop,
    descendants,
    flower_environment,
    kill,
    log_file,
    program,
    reap,
    require_free_port,
    runner,
    wait_until,
)
from fedmed.deployment.provision import readable_cards
from fedmed.deployment.proxy import Proxy
from fedmed.durable import make_private, open_to_others
from fedmed.errors import ConfigError, FedmedError, RunFailed

START_S = 300.0  # on a busy machine importing Flower takes a while
LOOK_S = 2.0  # between two looks at the list of sites
LOST_S = 20.0  # between two looks for runs whose process is gone
RESTART_S, LONGEST_WAIT_S = 2.0, 60.0  # before a start; twice as long after each that failed
RENEWED = "the server's certificate was renewed"
DAY = timedelta(days=1)  # before a certificate's end, in which no run is waited for


def server_command(folder: ServerFolder) -> list[str]:
    """The SuperLink's command line."""
    program(LAUNCHER)  # it starts the server's tasks
    tls, (host, port) = folder.tls, folder.consortium.inside
    return [
        *(sys.executable, "-P", "-m", "fedmed.deployment.guarded"),
        *("--host", host, "--port", str(port)),
        *("--ssl-certfile", str(tls / certificates.SERVER), "--ssl-keyfile", str(tls / certificates.SERVER_KEY)),
        *("--ssl-ca-certfile", str(tls / certificates.AUTHORITY)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(folder.flower / "superlink.db")),
    ]


def require_usable(folder: ServerFolder) -> x509.Certificate:
    """Check what can be checked before anything is started; gives the server's certificate.

    Raises:
        ConfigError: nothing is provisioned, a certificate is no good now, or others may read a key.
    """
    if not (folder.tls / certificates.SERVER).exists():
        raise ConfigError("nothing is provisioned yet; fedmed server provision consortium.toml CARD…")
    authority = certificates.read_certificate(folder.tls / certificates.AUTHORITY)
    certificate = certificates.read_certificate(folder.tls / certificates.SERVER)
    wrong = certificates.problem(certificate, authority, datetime.now(UTC))
    if wrong:
        raise ConfigError(f"the server's certificate cannot be used: {wrong}; fedmed server provision renews it")
    if not certificates.belong_together(certificate, folder.tls / certificates.SERVER_KEY):
        raise ConfigError("server.key and server.crt do not belong together; fedmed server provision makes both anew")
    for key in (
        folder.tls / certificates.SERVER_KEY,
        folder.tls / certificates.AUTHORITY_KEY,
        folder.coordinator / SIGNING,
    ):
        if key.exists() and open_to_others(key):
            raise ConfigError(f"{key} can be read by others on this machine; chmod 600 it")
    return certificate


def start_server(folder: ServerFolder, say: Callable[[str], None]) -> None:
    """Run the server until SIGTERM or Ctrl-C. Sites that are provisioned meanwhile may connect at once.

    A SuperLink or an nginx that ends by itself is started again, until it comes up. Flower then counts the run that was
    under way as failed; it is submitted again, and goes on from its checkpoint.

    Raises:
        ConfigError: it cannot be started like this, or runs already.
        RunFailed: the SuperLink or nginx cannot be started the first time.
    """
    require_usable(folder)
    environment = flower_environment(
        make_private(folder.flower),
        near=[folder.consortium.reached],
        FEDMED_RUNS=str(folder.runs),
        FEDMED_CACHE=os.environ.get("FEDMED_CACHE") or str(folder.root / "cache"),
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.5",
    )
    log = log_file(folder.root / "logs", "server")

    def tell(line: str) -> None:
        with suppress(OSError):  # a full disk
            say(line)
        log.info(line)

    with runner(folder.flower, "server") as stop:
        proxy, inner = Proxy(folder, environment, log), "loopback-port" if folder.consortium.loopback_port else "port"
        served, wait_s, why = False, RESTART_S, ""
        try:
            while not stop.is_set():
                link: Child | None = None
                try:
                    used = require_usable(folder)
                    require_free_port(*folder.consortium.inside, inner)
                    link = Child(server_command(folder), environment, log)
                    _await(folder, link, stop)
                    if not served:
                        proxy.start()
                    if not stop.is_set():
                        behind = ", behind nginx" if folder.consortium.loopback_port else ""
                        where = joined(folder.consortium.listen, folder.consortium.port)
                        tell(f"serving {folder.consortium.name} on {where} over TLS{behind}")
                        served, wait_s = True, RESTART_S
                        why = _serve(folder, link, used, proxy, stop, tell)
                except (ConfigError, RunFailed) as error:
                    if not served:
                        raise
                    why = str(error)
                finally:
                    if link is not None:
                        link.end()
                if not stop.is_set():
                    kill(descendants(os.getpid()) - proxy.pids)  # tasks without a server must not write any more
                    tell(f"{why}; it is started again in {wait_s:.0f} s")
                    stop.wait(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        finally:
            proxy.end()
    say("stopped")


def _await(folder: ServerFolder, link: Child, stop: Stop) -> None:
    """Wait until the SuperLink answers.

    Raises:
        RunFailed: it ended, or does not answer in time.
    """
    answered = wait_until(lambda: not link.running or _answers(folder), stop, START_S)
    if stop.is_set():
        return
    if not link.running:
        raise RunFailed("the server ended at once; logs/server.log says why")
    if not answered:
        raise RunFailed(f"the server did not answer within {START_S:.0f} s; logs/server.log says why")


def _serve(
    folder: ServerFolder,
    link: Child,
    used: x509.Certificate,
    proxy: Proxy,
    stop: Stop,
    say: Callable[[str], None],
) -> str:
    """Look after everything until the SuperLink ends or a stop is asked for; gives why it has to be started again.

    Args:
        folder: of the server.
        link: the SuperLink.
        used: its certificate, which it never reads again.
        proxy: nginx, if it is wanted.
        stop: whether to stop.
        say: tells and logs a line.
    """
    known: object = None
    every: list[FlowerRun] = []
    began = datetime.now(UTC) - timedelta(seconds=time.monotonic() - link.started)
    launcher, earlier, looked = Launcher(link.pid), None, -LOST_S
    told: set[str] = set()  # what was said at the last look, and is not said again
    while not stop.is_set():
        if not link.running:
            return "the SuperLink ended by itself"
        if launcher.gone():
            return "what starts the SuperLink's tasks ended"
        for line in proxy.read_again():
            say(line)
        listed = stamps(folder.cards, "*.json"), stamps(folder.tls, certificates.SERVER)
        now = time.monotonic()
        if listed != known or now - looked > LOST_S:
            cards, damaged = readable_cards(folder)
            news = list(damaged.values())
            try:
                with control(own_entrance(folder)) as client:
                    news += agree(client, cards, damaged)
                    known, looked = listed, now
                    earlier = under_way(runs(client), began) if earlier is None else earlier
                    news += continue_lost(client, folder, earlier)
                    every = runs(client)
            except (FedmedError, OSError) as error:  # the server is not there yet
                news += [f"{error}; tried again"] if link.running else []
            if renewed(folder, used):
                if ends_within(folder, used, DAY) or all(run.ended for run in every):
                    return RENEWED
                news.append(f"{RENEWED}; the SuperLink takes it when the run under way has ended")
            else:
                news += ending(used)
            for line in news:
                if line not in told:
                    say(line)
            told = set(news)
        if said := proxy.look({link.pid} | descendants(link.pid)):
            say(said)
        reap(keep={link.pid} | proxy.pids)
        stop.wait(LOOK_S)
    return ""


def renewed(folder: ServerFolder, used: x509.Certificate) -> bool:
    """Whether there is another certificate of the server than the one in use, whole and good."""
    try:
        return require_usable(folder) != used
    except (ConfigError, OSError):  # between the writing of a certificate and of its key
        return False


def ends_within(folder: ServerFolder, used: x509.Certificate, time: timedelta) -> bool:
    """Whether the certificate in use is soon no good any more: by its end, or by another authority."""
    authority = certificates.read_certificate(folder.tls / certificates.AUTHORITY)
    return certificates.problem(used, authority, datetime.now(UTC) + time) is not None


def ending(used: x509.Certificate) -> list[str]:
    """What to say in the last days of the certificate in use; another line every day."""
    now = datetime.now(UTC)
    if not certificates.ends_soon(used, now):
        return []
    end, left = used.not_valid_after_utc, (used.not_valid_after_utc - now).days
    when = f"ends in {left} days, on {end:%Y-%m-%d}" if end > now else f"expired on {end:%Y-%m-%d}"
    return [f"the server's certificate {when}; fedmed server provision renews it"]


def _answers(folder: ServerFolder) -> bool:
    try:
        with control(own_entrance(folder)) as client:
            nodes(client)
    except RunFailed:
        return False
    return True
