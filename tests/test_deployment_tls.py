"""A server and hospitals that were set up by fedmed's commands alone, over TLS with registered keys, on loopback."""

import base64
import contextlib
import http.client
import io
import json
import logging
import re
import shutil
import signal
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from flwr.proto.message_pb2 import PushObjectRequest
from real_consortium import RUN, Started, command, make_consortium, make_site, processes_of, recorded, wait_for
from recorder import Recorder, spellings
from safetensors.numpy import load_file
from toy import PLANTED

from fedmed.deployment import certificates, control, node_keys
from fedmed.deployment.checks import check_site
from fedmed.deployment.consortium import ServerFolder, read_consortium
from fedmed.deployment.continuing import cut_off
from fedmed.deployment.coordinators import Entrance, entrance, own_entrance
from fedmed.deployment.files import read_json
from fedmed.deployment.kits import read_kit
from fedmed.deployment.processes import Child, flower_environment, free_port
from fedmed.deployment.proxy import ASKED, PLACES
from fedmed.deployment.site_folder import joined_kit, read_site_folder
from fedmed.deployment.supernode import site_command
from fedmed.errors import ConfigError, RunFailed

NGINX = bool(shutil.which("nginx") or shutil.which("nginx", path=PLACES))
SITES = ("a-40", "b-20", "c-20")
pytestmark = [pytest.mark.deployment, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a server with three sites, behind nginx where that is installed; a fourth site it does not know."""
    root = tmp_path_factory.mktemp("c")
    server = make_consortium(root, [*SITES, "nan-30"])
    (server / "sites" / "nan-30.json").unlink()
    edit(server / "consortium.toml", loopback_port=free_port() if NGINX else 0)
    return server


@pytest.fixture(scope="module")
def recorder(made):
    """Sites connect to it: it has the port that their kits name, and the server gets another one."""
    port = free_port()
    recorder = Recorder(made / "tls", read_consortium(made).consortium.port, port)
    edit(made / "consortium.toml", port=port)
    yield recorder
    recorder.close()


@pytest.fixture(scope="module")
def consortium(made, recorder):
    """A server that runs, and its three sites that run."""
    root = made.parent
    started = [Started("server", "start", made, log=root / "server.out")]
    started += [Started("site", "start", root / name, log=root / f"{name}.out") for name in SITES]
    try:
        started[0].says(f"{SITES[-1]} may connect", 240)
        folder = read_consortium(made)
        wait_for(lambda: online(folder) == set(SITES), 400, lambda: f"only {online(folder)} came")
        yield folder
    finally:
        ended = [each.stop() for each in reversed(started)]
    assert ended == [(0, [])] * 4, "a runner ended badly, or left processes behind"
    nothing_planted(root, recorder.streams)  # whatever the tests here sent and logged until now


@pytest.fixture(scope="module")
def anna(consortium):
    """The folder of a coordinator at another machine, who reaches the server through nginx alone."""
    if not NGINX:
        pytest.skip("nginx is not installed")
    command("server", "coordinator", "anna", "--server", consortium.root)
    given = consortium.root / "coordinators" / "anna"
    wait_for(lambda: let_in(entrance(given)), 60, lambda: "the server did not read its list again")
    return given


def let_in(server: Entrance) -> bool:
    with contextlib.suppress(RunFailed), control.control(server) as client:
        control.nodes(client)
        return True
    return False


@pytest.fixture(scope="module")
def run(consortium, request, tmp_path_factory):
    """A completed run, submitted by a coordinator elsewhere where there is nginx: its number and its folder."""
    server = request.getfixturevalue("anna") if NGINX else consortium.root
    facts = submitted(server, tmp_path_factory.mktemp("run") / "run.toml")
    assert facts["status"] == "finished:completed"
    assert (facts["folder"] is None) == NGINX
    (folder,) = consortium.runs.iterdir()
    return facts["run"], folder


def submitted(server: Path, run: Path, text: str = RUN) -> dict[str, object]:
    run.write_text(text)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command("server", "submit", run, "--server", server, "--wait", "--json")
    return json.loads(said.getvalue())


def edit(path: Path, **values: int) -> None:
    text = path.read_text()
    for key, value in values.items():
        text = re.sub(rf"(?m)^{key.replace('_', '-')} = .*$", f"{key.replace('_', '-')} = {value}", text)
    path.write_text(text)


def online(folder: ServerFolder) -> set[str]:
    """The sites that are connected; none while the server does not answer."""
    with contextlib.suppress(RunFailed, ConfigError), control.control(own_entrance(folder)) as client:
        return {node.site for node in control.nodes(client) if node.status == "online"}
    return set()


def submit(folder: ServerFolder, tmp_path: Path, text: str = RUN) -> Path:
    facts = submitted(folder.root, tmp_path / "run.toml", text)
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


def nothing_planted(root: Path, streams: list[bytes]) -> None:
    """No patient's identifier stands in a file but a ledger's, and none crossed the wire, in any spelling."""
    for path in (path for path in root.rglob("*") if path.is_file() and "ledger" not in path.parts):
        assert PLANTED.encode() not in path.read_bytes(), path.name
    for stream in streams:
        for spelling in spellings(PLANTED):
            assert spelling not in stream


def test_a_run_over_tls_completes_with_the_weights_of_the_local_engine(consortium, recorder, run, toy_config, simulate):
    folder = run[1]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed"
    assert [site["site"] for site in result["sites"]] == list(SITES)
    ours = parameters(simulate(toy_config(*SITES, strategy={"min_sites": 2}))[1].path)
    np.testing.assert_allclose(parameters(folder), ours, rtol=0, atol=1e-6)
    root = consortium.root.parent
    for site in SITES:
        assert (root / site / "state" / "ledger").exists()
        log = (root / site / "logs" / "site.log").read_text()
        assert "ready for tasks" in log
    nothing_planted(root, recorder.streams)


def test_a_secure_sum_over_tls_gives_the_same_weights(consortium, run, tmp_path):
    text = RUN.replace("min-sites = 2", "min-sites = 3\nsecure-sum = true")
    folder = submit(consortium, tmp_path, text)
    np.testing.assert_allclose(parameters(folder), parameters(run[1]), rtol=0, atol=1e-6)
    for site in SITES:
        lines = (consortium.root.parent / site / "state" / "egress.jsonl").read_text().splitlines()
        trained = [json.loads(line)["body"] for line in lines if '"train"' in line][-1]
        assert {row["name"] for row in trained["left"] if row["kind"] == "vector"} == {"masked"}


def test_what_crossed_the_wire_can_be_searched_for_what_was_planted(consortium, recorder, run):
    """All that passed between the sites and the server, as it was before TLS, both ways. The end searches it again."""
    streams = recorder.streams
    assert sum(map(len, streams)) > 4 * 4 * 700  # two sites, two rounds: that network's parameters each way
    for said in (b"/v1/fleet/push-object", b"toy:network", b"a-40"):  # what does cross is found
        assert any(said in stream for stream in streams), said
    for stream in streams:
        lower = stream.lower()
        assert b"content-encoding" not in lower and b"transfer-encoding" not in lower  # so bodies stand there plainly
    planted = [b"--" + spellings(PLANTED)[-1]]
    with pytest.raises(AssertionError):
        nothing_planted(consortium.runs, planted)  # what does cross is found


def test_every_task_is_forked_from_the_warm_process(consortium, run):
    """Flower's own `flwr-clientapp` is never started, and the app that the server sent is never unpacked."""
    for site in SITES:
        flower = consortium.root.parent / site / "flower"
        assert (flower / "bin" / "flwr-clientapp").stat().st_mode & 0o077 == 0
        assert not (flower / "apps").exists()


def test_a_key_that_is_not_registered_is_refused(consortium):
    child, lines = supernode(consortium.root.parent / "nan-30")
    try:
        assert child.wait(240), lines
        assert child.flower_code == 305
    finally:
        child.end()
    assert "nan-30" not in online(consortium)


def test_a_server_of_another_authority_is_refused(consortium, tmp_path):
    impostor = make_consortium(tmp_path, ["a-40"])
    site = tmp_path / "a-40"
    values = read_json(consortium.root.parent / "a-40" / "consortium" / "kit.json", "kit")
    edit(impostor / "consortium.toml", port=int(values["address"].rpartition(":")[2]))
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
    try:
        status = connection.getresponse().status
    except (http.client.HTTPException, OSError):
        status = None  # hung up; nginx says what was wrong
    assert status == (400 if NGINX else None)
    connection.close()


def web(folder: ServerFolder, given: Path | None = None, pair: tuple[Path, Path] | None = None) -> httpx.Client:
    """A client at another address of the server's public port, with a coordinator's folder or another certificate."""
    context = ssl.create_default_context(cafile=str(folder.tls / "ca.crt"))
    if given is not None:
        pair = (given / "coordinator.crt", given / "coordinator.key")
    if pair is not None:
        context.load_cert_chain(*pair)
    way = httpx.HTTPTransport(verify=context, local_address="127.0.0.9")
    return httpx.Client(base_url=f"https://127.0.0.1:{folder.consortium.port}", transport=way)


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_a_site_cannot_submit_a_run_register_a_node_or_stop_one(consortium):
    """It has the authority's certificate and its own node key; that opens the sites' interface and nothing else."""
    from flwr.superlink.routers.control.router import router as for_coordinators

    site = Entrance(address=f"127.0.0.1:{consortium.consortium.port}", authority=consortium.tls / "ca.crt")
    for ask in (control.nodes, control.runs, lambda client: control.stop_run(client, 1)):
        with pytest.raises(RunFailed, match=r"refused \(403\)"), control.control(site) as client:
            ask(client)
    key = node_keys.read_node_key(consortium.root.parent / "a-40" / "keys")
    moment = datetime.now(UTC).isoformat()
    headers = {
        "flwr-timestamp": moment,
        "flwr-public-key": base64.b64encode(node_keys.flower_bytes(key.public_key())).decode(),
        "flwr-signature": base64.b64encode(node_keys.sign(key, moment.encode())).decode(),
        "x-forwarded-for": "127.0.0.1",
        "content-type": "application/protobuf",
    }
    with web(consortium) as client:
        paths = [route.path for route in for_coordinators.routes]
        assert {"/v1/control/start-run", "/v1/control/register-node", "/v1/control/stop-run"} <= set(paths)
        for path in [*paths, "/fedmed/runs", "/fedmed/files/x"]:
            assert client.post(path, headers=headers).status_code == 403, path
            assert client.get(path).status_code == 403, path
        for path in ("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1//control/start-run"):
            request = client.build_request("POST", "/", headers=headers)
            request.url = request.url.copy_with(raw_path=path.encode())
            assert client.send(request).status_code == 403, path
        for path in ("/v1/runtime/push-messages", "/", "/docs", "/openapi.json", "/v1/controlx"):
            assert client.post(path, headers=headers).status_code == 404, path


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_the_sites_interface_takes_posts_only(consortium, method):
    with web(consortium) as client:
        assert client.request(method, "/v1/fleet/pull-messages").status_code == 405


def test_a_coordinator_elsewhere_sees_the_sites_and_fetches_a_run_folder(consortium, anna, run, tmp_path, capsys):
    with web(consortium, anna) as client:
        assert run[1].name in client.get("/fedmed/runs").json()["runs"]
    capsys.readouterr()
    command("server", "status", anna, "--json")
    sites = {site["site"]: site["status"] for site in json.loads(capsys.readouterr().out)["sites"]}
    assert sites == dict.fromkeys(SITES, "online")
    command("server", "fetch", run[0], "--server", anna, "--out", tmp_path)
    names = {path.relative_to(run[1]) for path in run[1].rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == names
    assert all((tmp_path / name).read_bytes() == (run[1] / name).read_bytes() for name in names)


def test_a_fetch_that_was_cut_off_goes_on_and_one_that_was_damaged_is_found(consortium, anna, tmp_path):
    large = consortium.runs / "20200101T000000-large-1"
    (large / "checkpoints").mkdir(parents=True)
    content = np.random.default_rng(7).bytes(3_000_000)
    (large / "checkpoints" / "round-0001.safetensors").write_bytes(content)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "round-0001.safetensors"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content[:1_000_000])
    fetch = ("server", "fetch", large.name, "--server", anna, "--out", tmp_path)
    command(*fetch)
    assert path.read_bytes() == content and not partial.exists()
    path.unlink()
    partial.write_bytes(b"x" + content[1:1_000_000])
    with pytest.raises(RunFailed, match="fetch again"):
        command(*fetch)
    command(*fetch)
    assert path.read_bytes() == content
    shutil.rmtree(large)
    with pytest.raises(RunFailed, match="no folder"):
        command(*fetch)


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_a_certificate_that_is_foreign_another_or_no_longer_listed_opens_nothing(consortium, tmp_path):
    command("server", "coordinator", "carl", "--server", consortium.root)  # and taken off again: never on the list
    (consortium.coordinators / "carl.crt").unlink()
    certificates.make_authority(tmp_path, "toys")
    pem, key = certificates.make_coordinator_certificate(tmp_path, "anna", 1)
    (tmp_path / "x.crt").write_bytes(pem)
    (tmp_path / "x.key").write_bytes(key)
    server = (consortium.tls / "server.crt", consortium.tls / "server.key")
    for pair, status in (((tmp_path / "x.crt", tmp_path / "x.key"), 400), (server, 400)):
        with web(consortium, pair=pair) as client:
            assert client.post("/v1/control/list-runs").status_code == status
    with web(consortium, consortium.coordinators / "carl") as client:
        assert client.post("/v1/control/list-runs").status_code == 403
        assert client.get("/fedmed/runs").status_code == 403


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_pieces_of_a_large_network_pass_and_what_no_site_sends_does_not(consortium):
    with web(consortium) as client:
        for mebibytes, status in ((5, 401), (15, 401), (17, 413)):  # 401: the server itself asks for a site's key
            answer = client.post(
                "/v1/fleet/push-object",
                content=PushObjectRequest(object_content=bytes(mebibytes << 20)).SerializeToString(),
                headers={"content-type": "application/protobuf", "accept": "application/protobuf"},
            )
            assert answer.status_code == status, mebibytes


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_a_damaged_certificate_on_the_list_ends_nothing_and_keeps_nobody_on_it(consortium, anna):
    out = consortium.root.parent / "server.out"
    said = len(out.read_text())
    command("server", "coordinator", "dora", "--server", consortium.root)
    dora = entrance(consortium.coordinators / "dora")
    wait_for(lambda: let_in(dora), 60, out.read_text)
    (consortium.coordinators / "damaged.crt").write_text("no certificate")
    wait_for(lambda: "damaged is shut out: the certificate is damaged" in out.read_text()[said:], 60, out.read_text)
    (consortium.coordinators / "dora.crt").unlink()
    wait_for(lambda: not let_in(dora), 60, out.read_text)
    assert let_in(entrance(anna))
    (consortium.coordinators / "damaged.crt").unlink()


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_a_coordinator_elsewhere_may_ask_four_things_and_register_nobody(consortium, anna):
    from flwr.superlink.routers.control.router import router as for_coordinators

    with web(consortium, anna) as client:
        for path in [route.path for route in for_coordinators.routes]:
            allowed = path.rpartition("/")[2] in ASKED
            assert (client.post(path).status_code == 403) != allowed, path


@pytest.mark.slow
def test_a_network_of_125_megabytes_passes_both_ways(consortium, tmp_path):
    heavy = 'name = "toy:heavy"\nwidth = 31_000'
    text = RUN.replace('name = "toy:network"', heavy).replace("rounds = 2", "rounds = 1")
    folder = submit(consortium, tmp_path, text)
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert load_file(folder / "checkpoints" / "round-0001.safetensors")["parameters"].nbytes > 124_000_000


@pytest.mark.slow
def test_updates_that_cannot_be_used_are_refused_over_the_link_too(consortium, tmp_path):
    """More sites are let in: one's update is not finite, one's is of another network, one's has 80 MB, one's is late.

    What else is refused, the tests of the local engine show. Both engines hand the same records to the same function,
    after which nothing knows where they came from.
    """
    folders = [consortium.root.parent / "nan-30"]
    folders += [make_site(tmp_path, name) for name in ("wide-30", "huge-30", "late-30")]
    for folder in folders[1:]:
        (folder / "site.toml").write_text((folder / "site.toml").read_text().replace("toy:dataset", "liars:dataset"))
    command("server", "provision", consortium.root, *(folder / "card.json" for folder in folders))
    for folder in folders[1:]:
        kit = consortium.kits / folder.name
        command("site", "join", kit, "--site", folder, "--coordinator", read_kit(kit).fingerprint)
    started = [Started("site", "start", folder, log=tmp_path / f"{folder.name}.out") for folder in folders]
    names = [folder.name for folder in folders]
    try:
        wait_for(lambda: online(consortium) == {*SITES, *names}, 300, lambda: f"only {online(consortium)} came")
        folder = submit(consortium, tmp_path, RUN.replace("rounds = 2", "rounds = 1") + "round-timeout-s = 120\n")
    finally:
        ended = [each.stop() for each in started]
        for name in names:
            (consortium.cards / f"{name}.json").unlink()
    assert ended == [(0, [])] * 4
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "degraded" and "nan-30: the update's parameters are not finite" in result["reason"]
    for name, size in (("wide-30", 1_000), ("huge-30", 20_000_000)):
        assert f"{name}: the update has ({size}, 0) values" in result["reason"]
    assert "late-30: the task was not done at the round's deadline" in result["reason"]
    assert [entry["joined"] for entry in result["rounds_log"]] == [list(SITES)]


LONG = RUN.replace("toy:network", "toy:slow").replace("rounds = 2", "rounds = 4\nlocal-steps = 20")  # 2 s a round
MOMENTS = ["early", "middle", "late"]  # a site begins a round's training, is in it, has an update that is to leave


@pytest.mark.slow
@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_completes_after_a_kill_of_nginx(consortium, tmp_path, moment):
    """Its workers go on for a moment, and hold the port; the runner ends them and starts nginx again."""
    out = consortium.root.parent / "server.out"
    said = len(out.read_text())
    folder = run_with_a_kill(consortium, tmp_path, moment, lambda process: process.name() == "nginx")
    assert "nginx ended by itself" in out.read_text()[said:]
    assert "run_continued" not in (folder / "events.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_goes_on_after_a_kill_of_the_superlink(consortium, tmp_path, moment):
    """Nobody does anything: the server starts it again and submits the run again, which goes on in its folder."""
    guarded = "fedmed.deployment.guarded"
    folder = run_with_a_kill(consortium, tmp_path, moment, lambda process: guarded in process.cmdline())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (again,) = (event for event in events if event["kind"] == "run_continued")
    assert "ended before the run did" in again["reason"]


def run_with_a_kill(folder: ServerFolder, tmp_path: Path, moment: str, of: Callable[[psutil.Process], bool]) -> Path:
    """The folder of a run of four rounds, in the second of which a child of the server's runner was killed."""
    (tmp_path / "run.toml").write_text(LONG)
    before, site = set(folder.runs.glob("*")), folder.root.parent / "a-40"
    begun = {log: recorded(site, log, "train") for log in ("audit", "egress")}
    words = ("server", "submit", tmp_path / "run.toml", "--server", folder.root, "--wait")
    waiting = Started(*words, log=tmp_path / "x")
    try:
        wait_for(lambda: recorded(site, "audit", "train") == begun["audit"] + 2, 240, waiting.log.read_text, 0.02)
        seen = time.monotonic()
        (victim,) = filter(of, psutil.Process(server_runner(folder)).children())
        wait_for(lambda: moment != "middle" or time.monotonic() > seen + 1, 10, str)
        sent = begun["egress"] + 1 + (moment == "late")
        wait_for(lambda: recorded(site, "egress", "train") == sent, 60, waiting.log.read_text, 0.02)
        victim.kill()
        assert rounds_in(folder.runs, before) == 1
        assert waiting.process.wait(400) == 0, (tmp_path / "x").read_text()
    finally:
        waiting.stop()
    (made,) = set(folder.runs.glob("*")) - before
    result = json.loads((made / "result.json").read_text())
    assert result["status"] in ("completed", "degraded")
    assert [entry["round"] for entry in result["rounds_log"]] == [1, 2, 3, 4]
    return made


@pytest.mark.slow
def test_a_run_that_a_coordinator_stopped_stays_stopped(consortium, tmp_path):
    (tmp_path / "run.toml").write_text(LONG)
    before = set(consortium.runs.glob("*"))
    words = ("server", "submit", tmp_path / "run.toml", "--server", consortium.root, "--wait")
    waiting = Started(*words, log=tmp_path / "x")
    try:
        wait_for(lambda: rounds_in(consortium.runs, before) >= 1, 240, waiting.log.read_text)
        number = re.search(r"run (\d+) of toy is submitted", waiting.log.read_text())[1]
        command("server", "stop", number, "--server", consortium.root)
        assert waiting.process.wait(120) == 1
    finally:
        waiting.stop()
    assert "finished:stopped" in waiting.log.read_text()
    with control.control(own_entrance(consortium)) as client:
        every = control.runs(client)
    assert cut_off(every, [run.number for run in every]) == []


def rounds_in(runs: Path, before: set[Path]) -> int:
    """How many rounds a new run has finished; -1 while it has not begun."""
    new = [path / "events.jsonl" for path in set(runs.glob("*")) - before if (path / "events.jsonl").exists()]
    kinds = [json.loads(line)["kind"] for path in new for line in path.read_text().splitlines()]
    return kinds.count("round_finished") if "round_started" in kinds else -1


@pytest.mark.slow
def test_a_supernode_without_tls_gets_nowhere(consortium, tmp_path):
    site = read_site_folder(consortium.root.parent / "nan-30")
    words = site_command(site, joined_kit(site), free_port())
    for option in ("--root-certificates", "--auth-supernode-private-key"):
        place = words.index(option)
        del words[place : place + 2]
    child = Child([*words, "--insecure"], flower_environment(tmp_path), logging.Logger("node"))
    try:
        child.wait(60)  # it may try for ever
        assert online(consortium) == set(SITES)
    finally:
        child.end()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["fedmed.deployment.node", "fedmed.deployment.warm"])
def test_a_run_completes_after_a_kill_at_a_site(consortium, tmp_path, program):
    """The runner starts again what was killed; a SuperNode is let in when the server has missed it for a minute."""
    out = consortium.root.parent / "a-40.out"
    said = len(out.read_text())
    below = psutil.Process(runner_of(consortium, "a-40")).children()
    alive = [process for process in below if process.status() != psutil.STATUS_ZOMBIE]
    (victim,) = (process for process in alive if program in " ".join(process.cmdline()))
    victim.send_signal(signal.SIGKILL)
    wait_for(lambda: "again" in out.read_text()[said:], 60, lambda: out.read_text())
    if program == "fedmed.deployment.node":  # which says no farewell
        wait_for(lambda: "a-40" not in online(consortium), 120, lambda: "the server has not missed it")
    wait_for(lambda: online(consortium) == set(SITES), 300, lambda: f"only {online(consortium)} came")
    assert json.loads((submit(consortium, tmp_path) / "result.json").read_text())["status"] == "completed"


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


def server_runner(folder: ServerFolder) -> int:
    """The pid of the server's runner."""
    words = ["server", "start", str(folder.root)]
    (found,) = (p.pid for p in psutil.Process().children() if p.cmdline()[-3:] == words)
    return found


def runner_of(folder: ServerFolder, site: str) -> int:
    """The pid of a site's runner, from the lines that it was started with."""
    place = str(folder.root.parent / site)
    found = [p.pid for p in psutil.Process().children() if p.cmdline()[-3:] == ["site", "start", place]]
    assert len(found) == 1
    return found[0]


def test_a_site_learns_what_the_run_gave_its_patients_over_a_network_of_its_own(consortium, run, capsys):
    capsys.readouterr()
    command("site", "baseline", consortium.root.parent / "a-40")
    said = capsys.readouterr().out
    assert re.search(r"^auroc [01]\.\d+.* local$", said, re.M)
    assert re.search(r"^auroc [01]\.\d+.* federated, [+-]0\.\d+ over the site's own$", said, re.M)
    page = Path(said.rpartition("page: ")[2].strip()).read_text()
    assert "trained here alone" in page


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
    assert [entry["joined"] for entry in result["rounds_log"]] == [["a-40", "c-20"]] * 2
    said = (folder / "events.jsonl").read_text() + json.dumps(result)
    assert "not one that this site approves of (approved-apps)" in said


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_nginx_shows_a_renewed_certificate_and_the_sites_come_back(consortium):
    """The last test here: the SuperLink is started again."""
    address = ("127.0.0.1", consortium.consortium.port)
    certificates.make_server_certificate(consortium.tls, consortium.consortium.names, 60)
    renewed = (consortium.tls / "server.crt").read_text()
    out = consortium.root.parent / "server.out"
    wait_for(lambda: ssl.get_server_certificate(address) == renewed, 120, out.read_text)
    wait_for(lambda: "the server's certificate was renewed" in out.read_text(), 120, out.read_text)
    wait_for(lambda: online(consortium) == set(SITES), 240, out.read_text)
