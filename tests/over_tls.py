"""A server and hospitals that were set up by fedmed's commands alone, over TLS with registered keys, on loopback."""

import contextlib
import io
import json
import logging
import re
import shutil
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from hospitals import SITES
from real_consortium import RUN, Started, command, make_consortium, online, wait_for, words_of
from recorder import Recorder, spellings
from safetensors.numpy import load_file
from toy import PLANTED

from fedmed.deployment import control
from fedmed.deployment.consortium import ServerFolder, read_consortium
from fedmed.deployment.continuing import finished
from fedmed.deployment.coordinators import Entrance, entrance, own_entrance
from fedmed.deployment.processes import Child, flower_environment, free_port
from fedmed.deployment.proxy import PLACES
from fedmed.deployment.site_folder import joined_kit, read_site_folder
from fedmed.deployment.supernode import site_command
from fedmed.errors import RunFailed
from fedmed.federated.run_folder import folder_of

NGINX = bool(shutil.which("nginx") or shutil.which("nginx", path=PLACES))
needs_nginx = pytest.mark.skipif(not NGINX, reason="nginx is not installed")
LONG = RUN.replace("toy:network", "toy:slow").replace("rounds = 2", "rounds = 4\nlocal-steps = 20")  # 2 s a round


@contextmanager
def over_tls(root: Path, sites: Sequence[str] = SITES) -> Iterator[tuple[ServerFolder, Recorder]]:
    """A server that runs, behind nginx where that is installed, and those of its three sites that run too.

    The sites connect to a recorder: it has the port that their kits name, and the server has another one. A fourth
    site, nan-30, has a kit, and the server does not know it.
    """
    server = make_consortium(root, [*SITES, "nan-30"])
    (server / "sites" / "nan-30.json").unlink()
    port = free_port()
    recorder = Recorder(server / "tls", read_consortium(server).consortium.port, port)
    edit(server / "consortium.toml", port=port, loopback_port=free_port() if NGINX else 0)
    started = [Started("server", "start", server, log=root / "server.out")]
    started += [Started("site", "start", root / name, log=root / f"{name}.out") for name in sites]
    try:
        started[0].says(f"{SITES[-1]} may connect", 240)
        wait_for(lambda: online(server) == set(sites), 400, lambda: f"only {online(server)} came")
        yield read_consortium(server), recorder
    finally:
        ended = [each.stop() for each in reversed(started)]
        recorder.close()
    assert ended == [(0, [])] * len(started), "a runner ended badly, or left processes behind"
    nothing_planted(root, recorder.streams)  # whatever was sent and logged until now


def edit(path: Path, **values: int) -> None:
    text = path.read_text()
    for key, value in values.items():
        text = re.sub(rf"(?m)^{key.replace('_', '-')} = .*$", f"{key.replace('_', '-')} = {value}", text)
    path.write_text(text)


def nothing_planted(root: Path, streams: list[bytes]) -> None:
    """No patient's identifier stands in a file but a ledger's, and none crossed the wire, in any spelling."""
    for path in (path for path in root.rglob("*") if path.is_file() and "ledger" not in path.parts):
        assert PLANTED.encode() not in path.read_bytes(), path.name
    for stream in streams:
        for spelling in spellings(PLANTED):
            assert spelling not in stream


# Coordinators.


def admitted(folder: ServerFolder, name: str) -> Path:
    """The folder of a coordinator at another machine, who reaches the server through nginx alone."""
    command("server", "coordinator", name, "--server", folder.root)
    given = folder.coordinators / name
    wait_for(lambda: let_in(entrance(given)), 60, lambda: "the server did not read its list again")
    return given


def let_in(server: Entrance) -> bool:
    with contextlib.suppress(RunFailed), control.control(server) as client:
        control.nodes(client)
        return True
    return False


def web(folder: ServerFolder, given: Path | None = None, pair: tuple[Path, Path] | None = None) -> httpx.Client:
    """A client at another address of the server's public port, with a coordinator's folder or another certificate."""
    context = ssl.create_default_context(cafile=str(folder.tls / "ca.crt"))
    if given is not None:
        pair = (given / "coordinator.crt", given / "coordinator.key")
    if pair is not None:
        context.load_cert_chain(*pair)
    way = httpx.HTTPTransport(verify=context, local_address="127.0.0.9")
    return httpx.Client(base_url=f"https://127.0.0.1:{folder.consortium.port}", transport=way)


# Runs.


def submitted(server: Path, run: Path, text: str, *options: str) -> dict[str, object]:
    run.write_text(text)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command("server", "submit", run, "--server", server, "--json", *options)
    return json.loads(said.getvalue())


def ended(folder: ServerFolder, number: int) -> Path:
    """The folder of a run that was submitted, once it has ended."""
    run = finished(own_entrance(folder), number, print)
    return folder_of(folder.runs, run.series)


def submit(folder: ServerFolder, tmp_path: Path, text: str = RUN) -> Path:
    facts = submitted(folder.root, tmp_path / "run.toml", text, "--wait")
    assert facts["status"] == "finished:completed"
    return Path(facts["folder"])


def parameters(folder: Path) -> np.ndarray:
    return load_file(folder / "checkpoints" / "round-0002.safetensors")["parameters"]


def rounds_in(runs: Path, before: set[Path]) -> int:
    """How many rounds a new run has finished; -1 while it has not begun."""
    new = [path / "events.jsonl" for path in set(runs.glob("*")) - before if (path / "events.jsonl").exists()]
    kinds = [json.loads(line)["kind"] for path in new for line in path.read_text().splitlines()]
    return kinds.count("round_finished") if "round_started" in kinds else -1


# Processes.


def supernode(site: Path, *, tls: bool = True) -> tuple[Child, list[str]]:
    """A SuperNode as the runner starts it, or without TLS and a key, and its lines."""
    folder, lines = read_site_folder(site), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.Logger("node")
    log.addHandler(Keep())
    words = site_command(folder, joined_kit(folder), free_port())
    if not tls:
        for option in ("--root-certificates", "--auth-supernode-private-key"):
            place = words.index(option)
            del words[place : place + 2]
        words.append("--insecure")
    return Child(words, flower_environment(folder.flower), log), lines


def runner_of(folder: ServerFolder, name: str) -> int:
    """The pid of the runner of a site, or of the "server"."""
    words = ["server" if name == "server" else "site", "start", str(folder.root.parent / name)]
    (found,) = (p.pid for p in psutil.Process().children() if words_of(p)[-3:] == words)
    return found
