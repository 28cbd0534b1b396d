"""A server by itself, without sites: what it refuses, what it goes on after, and how its own machine reaches it."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import zipfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartAutomationRequest, StartRunRequest
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.supercore.fab import Fab
from real_consortium import RUN, Started, command, make_consortium, make_site, wait_for, words_of

from fedmed import config as run_file
from fedmed.deployment import certificates, control, reach
from fedmed.deployment.consortium import read_consortium
from fedmed.deployment.coordinators import own_entrance
from fedmed.deployment.flower_app import app_folder, build_app
from fedmed.deployment.guarded import FOR_SERVER, without_own_files
from fedmed.deployment.node_keys import read_node_key
from fedmed.deployment.site_folder import joined_kit, read_site_folder
from fedmed.errors import ConfigError

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(300)]
LISTEN = "127.0.0.9"  # one interface's address, as a server without nginx may have it
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that runs, without nginx, where the environment names a proxy that leads nowhere."""
    root = tmp_path_factory.mktemp("s")
    made = make_consortium(root, ["north", "south"])
    path = made / "consortium.toml"
    path.write_text(path.read_text().replace('listen = "127.0.0.1"', f'listen = "{LISTEN}"'))
    command("server", "provision", made)
    started = Started("server", "start", made, log=root / "out", HTTPS_PROXY=NOWHERE, ALL_PROXY=NOWHERE)
    try:
        started.says("south may connect", 120)
        yield started, read_consortium(made)
    finally:
        ended = started.stop()
    assert ended == (0, [])


def status_of(act) -> int:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        act()
    return refused.value.response.status_code


def test_its_own_machine_reaches_it_at_one_interface_and_past_any_proxy(server, monkeypatch, capsys):
    monkeypatch.setenv("HTTPS_PROXY", NOWHERE)
    monkeypatch.setenv("NO_PROXY", "")
    capsys.readouterr()
    command("server", "status", server[1].root)
    assert "north" in capsys.readouterr().out


def test_a_coordinator_starts_the_app_that_is_installed_here_and_no_other(server):
    own = build_app()
    changed = io.BytesIO(own)
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr("server/more.py", "")

    def request(content: bytes, **more: object) -> StartRunRequest:
        fab, sites = Fab(hashlib.sha256(own).hexdigest(), content, {}), {"data.sites": "north,south"}
        return StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(sites), **more)

    with closing_control(server[1]) as client:
        for refused in (
            request(changed.getvalue()),
            request(b""),  # one that Flower stored before
            request(own, app_spec="@flwrlabs/quickstart"),
        ):
            assert status_of(lambda refused=refused: client.StartRun(refused)) == 403
        later = StartAutomationRequest(start_run_request=request(changed.getvalue(), series_id=7))
        assert status_of(lambda: client.StartAutomation(later)) == 403
        run = client.StartRun(request(own)).run_id
        assert run
        control.stop_run(client, run)


def test_flwr_run_starts_the_same_run_as_submit(server, tmp_path):
    """By what the page says of Flower's own command; a run that names no sites would be the demo's, of phantoms."""
    started, folder = server
    before = set(folder.runs.glob("*"))
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    (tmp_path / "config.toml").write_text(
        f'[superlink.chest]\naddress = "{LISTEN}:{folder.consortium.port}"\n'
        f'root-certificates = "{folder.tls / "ca.crt"}"\n'
    )
    config = run_file.load(file)
    flat = run_file.flatten(config)

    def flwr_run(sites: str) -> tuple[int, str]:
        given = {**{key: flat[key] for key in run_file.explicit_keys(config)}, "data.sites": sites}
        keys = " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
        off = {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        done = subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), "run", str(app_folder()), "chest", "--run-config", keys],
            env={**os.environ, **off, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def kept() -> list[str]:
        return [path.read_text() for path in folder.runs.glob("*/run.toml") if path.parent not in before]

    code, said = flwr_run("")
    assert code and "fedmed server submit fills it in" in said
    code, said = flwr_run("north,south")
    assert code == 0, said
    command("server", "submit", file, "--server", folder.root)
    wait_for(lambda: len(kept()) == 2, 120, started.log.read_text)
    assert kept()[0] == kept()[1]
    with control.control(own_entrance(folder)) as client:
        for run in control.runs(client):
            if not run.ended:
                control.stop_run(client, run.number)


def test_a_site_is_told_of_no_file_of_the_server():
    from flwr.superlink.routers.fleet import router
    from flwr.superlink.servicer.fleet import fleet_handlers

    config = run_file.flatten(run_file.validate({"data": {"server": "/own/a.csv"}, "model": {"weights": "/own/b.pt"}}))
    run = GetRunResponse(run=Run(run_id=1, override_config=user_config_to_proto(config)))
    told = user_config_from_proto(without_own_files(lambda request, state: run)(None, state=None).run.override_config)
    assert told == {key: value for key, value in config.items() if key not in FOR_SERVER} and told
    assert router.fleet_handlers is fleet_handlers and "get_run" in router.fleet_get_run.__code__.co_names


def closing_control(folder):
    """A connection on which Flower's own errors are seen."""
    entrance = own_entrance(folder)
    client = control.ControlHttpClient(f"https://{entrance.address}", verify=entrance.tls())
    return closing(client)


def test_a_request_without_end_is_refused_before_it_fills_the_memory(server):
    folder = server[1]

    def pieces(mebibytes: int):
        yield from (bytes(1 << 20) for _ in range(mebibytes))

    with httpx.Client(verify=own_entrance(folder).tls(), base_url=f"https://{own_entrance(folder).address}") as client:
        for mebibytes, status in ((12, 400), (80, 413)):  # 400: it was read, and is no message
            answer = client.post(
                "/v1/fleet/push-object",
                content=pieces(mebibytes),
                headers={"content-type": "application/protobuf", "accept": "application/protobuf"},
            )
            assert answer.status_code == status, mebibytes


def test_a_damaged_card_blocks_nobody_and_a_key_that_was_taken_out_stays_out(server, tmp_path, capsys):
    started, folder = server
    card, other = folder.cards / "north.json", folder.cards / "south.json"
    whole, kept = card.read_bytes(), other.read_bytes()
    card.write_bytes(whole[:100])
    other.unlink()
    started.says("south may no longer connect", 60)
    command_card = make_site(tmp_path, "west") / "card.json"
    (folder.cards / "west.json").write_bytes(command_card.read_bytes())
    started.says("west may connect", 60)
    said = started.log.read_text()
    assert said.count("north.json") == 1
    assert "north may no longer connect" not in said
    card.write_bytes(whole)
    other.write_bytes(kept)
    started.says("south may not connect: its key was taken out before", 60)
    command("server", "status", folder.root)
    assert "site south: not let in; its key was taken out before" in capsys.readouterr().out
    other.unlink()
    with pytest.raises(ConfigError, match=r"south: its key was taken out before.* fedmed site keygen"):
        command("server", "provision", folder.root, folder.root.parent / "south" / "card.json")
    assert not other.exists()


def test_a_site_learns_whether_it_is_on_the_list_and_nothing_changes_there(server, tmp_path):
    folder = server[1]
    north, stranger = read_site_folder(folder.root.parent / "north"), read_site_folder(make_site(tmp_path, "east"))
    kit = replace(joined_kit(north), address=f"{LISTEN}:{folder.consortium.port}")
    assert reach.admission(kit, read_node_key(north.keys)) == "the server lets this site in"
    with control.control(own_entrance(folder)) as client:
        assert {node.site: node.status for node in control.nodes(client)}["north"] == "registered"
    with pytest.raises(ConfigError, match="not on the server's list"):
        reach.admission(kit, read_node_key(stranger.keys))


def test_a_second_server_on_the_same_port_is_refused_before_it_serves(server, tmp_path):
    """A folder that was copied has the same keys, so that the first server would answer for it."""
    folder = server[1]
    copy = Path(shutil.copytree(folder.root, tmp_path / "copy"))
    second = Started("server", "start", copy, log=tmp_path / "out")
    assert second.process.wait(60) == 1
    port = folder.consortium.port
    assert f"another program listens on port {port} of {LISTEN}; end it, or change port in" in second.log.read_text()
    assert "serving" not in second.log.read_text()


def below(started: Started, words: str) -> list[psutil.Process]:
    children = psutil.Process(started.process.pid).children(recursive=True)
    return [process for process in children if words in " ".join(words_of(process))]


@pytest.mark.parametrize(
    ("killed", "why"),
    [
        ("flower-superexec", "what starts the SuperLink's tasks ended"),
        ("fedmed.deployment.guarded", "the SuperLink ended by itself"),
    ],
    ids=["launcher", "superlink"],
)
def test_it_is_started_again_after_a_kill(server, killed, why):
    started = server[0]
    said = started.log.read_text().count("serving")
    wait_for(lambda: bool(below(started, "flower-superexec")), 60, started.log.read_text)
    below(started, killed)[0].send_signal(signal.SIGKILL)
    wait_for(lambda: started.log.read_text().count("serving") > said, 120, started.log.read_text)
    assert f"{why}; it is started again" in started.log.read_text()
    wait_for(lambda: bool(below(started, "flower-superexec")), 60, started.log.read_text)


def test_it_takes_a_renewed_certificate_by_itself(server):
    started, folder = server
    address = (LISTEN, folder.consortium.port)
    said, before = started.log.read_text().count("serving"), ssl.get_server_certificate(address)
    certificates.make_server_certificate(folder.tls, folder.consortium.names, 60)
    wait_for(lambda: started.log.read_text().count("serving") > said, 120, started.log.read_text)
    assert "the server's certificate was renewed; it is started again" in started.log.read_text()
    shown = ssl.get_server_certificate(address)
    assert shown != before and shown == (folder.tls / "server.crt").read_text()


@pytest.mark.slow
def test_it_waits_and_tries_again_when_it_cannot_be_started_once_more(server):
    """Its port is taken between the end of the SuperLink and its next start."""
    started, folder = server
    said = started.log.read_text().count("serving")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        (link,) = below(started, "fedmed.deployment.guarded")
        link.kill()
        wait_for(lambda: bound(taken, (LISTEN, folder.consortium.port)), 2, lambda: "the port was not free")
        taken.listen()
        started.says("change port in consortium.toml; it is started again in 4 s", 120)
        assert started.process.poll() is None
    wait_for(lambda: started.log.read_text().count("serving") > said, 120, started.log.read_text)


def bound(listener: socket.socket, address: tuple[str, int]) -> bool:
    try:
        listener.bind(address)
    except OSError:
        return False
    return True
