"""A server and hospitals that were set up by fedmed's commands alone, over TLS with registered keys, on loopback."""

import contextlib
import http.client
import json
import logging
import re
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from real_consortium import RUN, Started, command, make_consortium, processes_of, recorded, wait_for
from safetensors.numpy import load_file
from toy import PLANTED

from fedmed.deployment import control
from fedmed.deployment.checks import check_site
from fedmed.deployment.consortium import ServerFolder, read_consortium
from fedmed.deployment.files import read_json
from fedmed.deployment.processes import Child, flower_environment, free_port
from fedmed.deployment.site_folder import joined_kit, read_site_folder
from fedmed.deployment.supernode import site_command
from fedmed.errors import RunFailed

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    """A server that runs, its two sites that run, and a third that it does not know."""
    root = tmp_path_factory.mktemp("c")
    server = make_consortium(root, ["a-40", "b-20", "unknown-30"])
    (server / "sites" / "unknown-30.json").unlink()
    started = [Started("server", "start", server, log=root / "server.out")]
    started += [Started("site", "start", root / name, log=root / f"{name}.out") for name in ("a-40", "b-20")]
    try:
        started[0].says("b-20 may connect", 240)
        folder = read_consortium(server)
        wait_for(lambda: online(folder) == {"a-40", "b-20"}, 400, lambda: f"only {online(folder)} came")
        yield folder
    finally:
        ended = [each.stop() for each in reversed(started)]
    assert ended == [(0, []), (0, []), (0, [])], "a runner ended badly, or left processes behind"


def online(folder: ServerFolder) -> set[str]:
    """The sites that are connected; none while the server does not answer."""
    with contextlib.suppress(RunFailed, FileNotFoundError), control.control(folder) as client:
        return {node.site for node in control.nodes(client) if node.status == "online"}
    return set()


def submit(folder: ServerFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Path:
    run = tmp_path / "run.toml"
    run.write_text(RUN)
    capsys.readouterr()
    command("server", "submit", run, "--server", folder.root, "--wait", "--json", *options)
    facts = json.loads(capsys.readouterr().out)
    assert facts["status"] == "finished:completed"
    return Path(facts["folder"])


def parameters(folder: Path) -> np.ndarray:
    return load_file(folder / "checkpoints" / "round-0002.safetensors")["parameters"]


def supernode(site: Path) -> tuple[Child, list[str]]:
    """A SuperNode as the runner starts it, and its lines."""
    folder, lines = read_site_folder(site), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.Logger("node")
    log.addHandler(Keep())
    return Child(site_command(folder, joined_kit(folder), free_port()), flower_environment(folder.flower), log), lines


def test_a_run_over_tls_completes_with_the_weights_of_the_local_engine(
    consortium, toy_config, simulate, tmp_path, capsys
):
    folder = submit(consortium, tmp_path, capsys)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed"
    assert [site["site"] for site in result["sites"]] == ["a-40", "b-20"]
    ours = parameters(simulate(toy_config("a-40", "b-20", strategy={"min_sites": 2}))[1].path)
    np.testing.assert_allclose(parameters(folder), ours, rtol=0, atol=1e-6)
    root = consortium.root.parent
    for site in ("a-40", "b-20"):
        assert (root / site / "state" / "ledger").exists()
        log = (root / site / "logs" / "site.log").read_text()
        assert "ready for tasks" in log
    for path in (path for path in root.rglob("*") if path.is_file() and "ledger" not in path.parts):
        assert PLANTED.encode() not in path.read_bytes(), path.name


def test_every_task_is_forked_from_the_warm_process(consortium):
    """Flower's own `flwr-clientapp` is never started, and the app that the server sent is never unpacked."""
    for site in ("a-40", "b-20"):
        flower = consortium.root.parent / site / "flower"
        assert (flower / "bin" / "flwr-clientapp").stat().st_mode & 0o077 == 0
        assert not (flower / "apps").exists()


def test_a_key_that_is_not_registered_is_refused(consortium):
    child, lines = supernode(consortium.root.parent / "unknown-30")
    try:
        assert child.wait(240), lines
        assert child.flower_code == 305
    finally:
        child.end()
    assert "unknown-30" not in online(consortium)


def test_a_server_of_another_authority_is_refused(consortium, tmp_path):
    impostor = make_consortium(tmp_path, ["a-40"])
    site = tmp_path / "a-40"
    values = read_json(consortium.root.parent / "a-40" / "consortium" / "kit.json", "kit")
    path = impostor / "consortium.toml"
    path.write_text(re.sub(r"port = \d+", f"port = {values['address'].rpartition(':')[2]}", path.read_text()))
    command("server", "provision", impostor)
    command("site", "join", impostor / "kits" / "a-40", "--site", site)
    found = {finding.what: finding for finding in check_site(site, dry_round=False)}
    assert found["port"].ok
    assert not found["certificate"].ok
    assert "tell the coordinator" in found["certificate"].said.lower()
    child, lines = supernode(site)
    try:
        assert child.wait(240), lines
        assert child.bad_certificate
    finally:
        child.end()


def test_the_port_speaks_no_plain_http(consortium):
    connection = http.client.HTTPConnection("127.0.0.1", consortium.consortium.port, timeout=10)
    connection.request("POST", "/v1/fleet/activate-node", body=b"")
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.getresponse()
    connection.close()


@pytest.mark.slow
def test_a_supernode_without_tls_gets_nowhere(consortium, tmp_path):
    site = read_site_folder(consortium.root.parent / "unknown-30")
    words = site_command(site, joined_kit(site), free_port())
    for option in ("--root-certificates", "--auth-supernode-private-key"):
        place = words.index(option)
        del words[place : place + 2]
    child = Child([*words, "--insecure"], flower_environment(tmp_path), logging.Logger("node"))
    try:
        child.wait(60)  # it may try for ever
        assert online(consortium) == {"a-40", "b-20"}
    finally:
        child.end()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["flower-supernode", "fedmed.deployment.warm"])
def test_a_run_completes_after_a_kill_at_a_site(consortium, tmp_path, capsys, program):
    """The runner starts again what was killed; a SuperNode is let in when the server has missed it for a minute."""
    out = consortium.root.parent / "a-40.out"
    said = len(out.read_text())
    below = psutil.Process(runner_of(consortium, "a-40")).children()
    (victim,) = (process for process in below if program in " ".join(process.cmdline()))
    victim.send_signal(signal.SIGKILL)
    wait_for(lambda: "again" in out.read_text()[said:], 60, lambda: out.read_text())
    wait_for(lambda: online(consortium) == {"a-40", "b-20"}, 300, lambda: f"only {online(consortium)} came")
    assert json.loads((submit(consortium, tmp_path, capsys) / "result.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_nothing_stays_when_a_runner_is_killed(tmp_path):
    server = make_consortium(tmp_path, ["a-40"])
    started = [Started("server", "start", server, log=tmp_path / "server.out")]
    started.append(Started("site", "start", tmp_path / "a-40", log=tmp_path / "a-40.out"))
    try:
        folder = read_consortium(server)
        wait_for(lambda: online(folder) == {"a-40"}, 300, lambda: "the site did not come")
        for each in started[::-1]:
            below = psutil.Process(each.process.pid).children(recursive=True)
            assert below
            each.process.kill()
            gone, left = psutil.wait_procs(below, timeout=60)
            assert left == []
            assert len(gone) == len(below)
    finally:
        for each in started:
            each.stop()


def runner_of(folder: ServerFolder, site: str) -> int:
    """The pid of a site's runner, from the lines that it was started with."""
    place = str(folder.root.parent / site)
    found = [p.pid for p in psutil.Process().children() if p.cmdline()[-3:] == ["site", "start", place]]
    assert len(found) == 1
    return found[0]


def test_a_site_that_is_well_passes_every_check(consortium, capsys):
    capsys.readouterr()
    command("site", "check", consortium.root.parent / "b-20", "--json")
    findings = json.loads(capsys.readouterr().out)
    assert [finding["what"] for finding in findings if not finding["ok"]] == []
    assert {"certificate", "clock", "port", "ledger", "disk", "versions"} <= {each["what"] for each in findings}


def test_a_site_that_does_not_approve_the_app_stays_out_and_a_killed_task_is_asked_again(consortium, tmp_path):
    """One run: b-20 refuses what the coordinator brings, and a-40's task is killed in the middle of a round."""
    root = consortium.root.parent
    policy = root / "b-20" / "site.toml"
    text = policy.read_text()
    policy.write_text(text.replace("approved-apps = []", f'approved-apps = ["{"0" * 64}"]'))
    run = tmp_path / "run.toml"
    slow = RUN.replace("toy:network", "toy:slow").replace("rounds = 2", "rounds = 2\nlocal-steps = 20")
    run.write_text(slow.replace("min-sites = 2", "min-sites = 1"))
    before = recorded(root / "a-40", "audit", "train")
    submitted = Started(
        "server", "submit", run, "--server", consortium.root, "--wait", "--json", log=tmp_path / "submit.out"
    )
    try:
        wait_for(lambda: recorded(root / "a-40", "audit", "train") > before, 200, submitted.log.read_text)
        processes_of(runner_of(consortium, "a-40"))["worker"].send_signal(signal.SIGKILL)
        submitted.process.wait(200)
    finally:
        policy.write_text(text)
        submitted.stop()
    folder = Path(json.loads(submitted.log.read_text().splitlines()[-1])["folder"])
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "degraded"
    assert [entry["joined"] for entry in result["rounds_log"]] == [["a-40"], ["a-40"]]
    said = (folder / "events.jsonl").read_text() + json.dumps(result)
    assert "not one that this site approves of (approved-apps)" in said
