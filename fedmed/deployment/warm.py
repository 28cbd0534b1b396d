"""The process at a site from which every task is forked, so that none imports torch again.

A task runs the fedmed that is installed here, whatever the server sent: the app's bytes are only compared with the
hashes that the site's kit and site.toml approve, and never unpacked. `task.py` says what a task may do.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import flwr.supernode.runtime.run_clientapp as flower_task
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from fedmed.config import RunConfig
from fedmed.deployment import door
from fedmed.deployment.health import CONFINEMENT
from fedmed.deployment.kits import read_kit
from fedmed.deployment.node import keep_server_time
from fedmed.deployment.site_folder import SiteFolder, read_site_folder
from fedmed.deployment.task import App, ConfinedWorker, confine_task, failed, refusal
from fedmed.durable import write_json
from fedmed.errors import ConfigError, FedmedError, PolicyRefused
from fedmed.federated.identity import package_hash
from fedmed.federated.simulation import prepare_fork
from fedmed.federated.site_config import read_site_config

REPLACED = ("install_from_fab", "get_load_client_app_fn")  # by these names Flower unpacks and loads an app
LOOPBACK_PORT, TOKEN, NUMBER = re.compile(r"127\.0\.0\.1:\d+"), re.compile(r"[\w.=+/-]+"), re.compile(r"\d+")
READ_S = 5.0
IDLE_S = 30.0


def serve(site: SiteFolder) -> NoReturn:
    """Import what tasks need, then fork one process for every task that the door hands in.

    Raises:
        RuntimeError: this Flower loads apps in another way, and would run what a server sends; or a thread runs.
    """
    if not all(name in vars(flower_task) for name in REPLACED):
        raise RuntimeError("this version of Flower loads apps in another way; nothing is run")
    prepare_fork(RunConfig())
    package_hash()  # of the code that was imported, whatever is installed over it later
    os.chdir(site.flower)
    Path(door.SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    os.umask(0o077)
    listener.bind(door.SOCKET)
    listener.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    if threading.active_count() != 1:
        raise RuntimeError("a thread was started before the fork")
    listener.settimeout(IDLE_S)
    _note_confinement(site)
    print("ready for tasks", flush=True)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            _prepare_rest()
            listener.settimeout(None)
            continue
        try:
            connection.settimeout(READ_S)
            arguments = json.loads(connection.makefile("r").readline())
        except (OSError, ValueError):
            connection.close()
            continue
        if os.fork() == 0:
            listener.close()
            _run(site, arguments, connection)
        connection.close()


def _note_confinement(site: SiteFolder) -> None:
    """Say in the log, and keep for the site's health, what a task is kept from. Only a process of its own can tell."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        held = confine_task(site)
        refused = refusal(site, held)
        print(f"every task: {held}{f'; each is refused: {refused}' if refused else ''}", flush=True)
        os.write(writing, json.dumps(vars(held)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe, suppress(OSError, ValueError):  # a full disk; or it ended
        write_json(site.flower / CONFINEMENT, json.load(pipe))


def _prepare_rest() -> None:
    """Import, while there is nothing to do, what only some tasks need: differential privacy, augmentation."""
    import fedmed.imaging.augment.planar
    import fedmed.training.private  # noqa: F401  # imported for the forks
    from fedmed.privacy.accounting import warm_up

    warm_up()
    gc.collect()
    gc.freeze()


def _run(site: SiteFolder, arguments: list[str], connection: socket.socket) -> NoReturn:
    """One task, in a process of its own."""
    code, worker = 1, None
    try:
        ahead, *words = arguments
        if not from_supernode(words):
            raise ValueError("a task that does not come from this machine's SuperNode is refused")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        random.seed()
        answer: App
        try:
            anew = read_site_folder(site.file)  # what the hospital changed holds from now on
            answer = worker = ConfinedWorker(anew)
        except (FedmedError, OSError) as error:
            print(f"no task can be made: {error}", file=sys.stderr, flush=True)
            answer = failed(error)
        vars(flower_task).update(zip(REPLACED, (admission(site), own_app(answer)), strict=True))
        keep_server_time(float(ahead))
        threading.Thread(target=_end_with, args=(connection, worker), daemon=True).start()
        sys.argv = ["flwr-clientapp", *words]
        flwr_clientapp()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        if worker is not None:
            worker.end()
        try:
            connection.sendall(f"{code}\n".encode())
        finally:
            sys.stdout.flush()
            os._exit(code)


def _end_with(connection: socket.socket, worker: ConfinedWorker | None) -> None:
    """End this task when the door is closed: the launcher that started it is gone, and nobody waits for its answer."""
    connection.settimeout(None)
    with suppress(OSError):
        connection.recv(1)  # the door says nothing more
    if worker is not None:
        worker.end()
    os._exit(1)


def from_supernode(arguments: list[str]) -> bool:
    """Whether these are the words with which a SuperNode on this machine starts a task, and no others.

    A task may open the door's socket. It must not be able to have another one speak with a machine elsewhere.
    """
    words = iter(arguments)
    known = {"--runtime-api-address": LOOPBACK_PORT, "--token": TOKEN, "--parent-pid": NUMBER}
    return all(
        word == "--insecure" or (word in known and known[word].fullmatch(next(words, "")) is not None) for word in words
    )


def admission(site: SiteFolder) -> Callable[..., None]:
    """A function in the place of Flower's, which unpacks an app: it only looks whether the site approves of it."""

    def admit(content: bytes, *arguments: Any, **options: Any) -> None:
        try:
            apps, own = read_kit(site.kit).apps, read_site_config(site.file).approved_apps
        except ConfigError as error:  # its text names files
            raise PolicyRefused(error.public, rule="kit.apps") from None
        digest = hashlib.sha256(content).hexdigest()
        if digest not in apps:
            raise PolicyRefused("the run's app is not one that this site's kit names (kit.apps)", rule="kit.apps")
        if own and digest not in own:
            text = "the run's app is not one that this site approves of (approved-apps)"
            raise PolicyRefused(text, rule="approved-apps")

    return admit


def own_app(app: App) -> Callable[..., Callable[..., App]]:
    """A function in the place of Flower's, which finds an app's loader: whatever is asked for, it is the site's own."""
    return lambda **options: lambda *names: app


if __name__ == "__main__":
    serve(read_site_folder(Path(sys.argv[1])))
