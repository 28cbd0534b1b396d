"""A server and three hospitals over TLS: runs, what crosses the wire meanwhile, and who is let in."""

import http.client
import json
import re
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from hospitals import SITES
from over_tls import (
    NGINX,
    admitted,
    edit,
    ended,
    needs_nginx,
    nothing_planted,
    over_tls,
    parameters,
    rounds_in,
    runner_of,
    submitted,
    supernode,
    web,
)
from real_consortium import RUN, command, make_consortium, online, processes_of, recorded, wait_for
from recorder import spellings
from toy import PLANTED

from fedmed.deployment import certificates, door
from fedmed.deployment.checks import check_site
from fedmed.deployment.coordinators import entrance
from fedmed.deployment.files import read_json
from fedmed.deployment.following import Following

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(500)]
HEADER = re.compile(r"(?m)^(content-type|accept|flwr-[\w-]+|content-length): (.*?)\r?$", re.IGNORECASE)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with over_tls(tmp_path_factory.mktemp("c")) as both:
        yield both


@pytest.fixture(scope="module")
def consortium(served):
    return served[0]


@pytest.fixture(scope="module")
def recorder(served):
    return served[1]


@pytest.fixture(scope="module")
def anna(consortium):
    """The folder of a coordinator at another machine; the server's own where no nginx lets one in."""
    return admitted(consortium, "anna") if NGINX else consortium.root


@pytest.fixture(scope="module")
def run(consortium, anna, tmp_path_factory):
    """A completed run, submitted by a coordinator elsewhere where there is nginx: its number and its folder."""
    facts = submitted(anna, tmp_path_factory.mktemp("run") / "run.toml", RUN, "--wait")
    assert facts["status"] == "finished:completed"
    assert (facts["folder"] is None) == NGINX
    (folder,) = consortium.runs.iterdir()
    return facts["run"], folder


def test_a_coordinator_is_told_of_every_event_once_and_only_of_whole_ones(anna, run, monkeypatch):
    path, told = run[1] / "events.jsonl", []
    content = path.read_bytes()
    follow = Following(entrance(anna), told.append)
    monkeypatch.setattr("fedmed.deployment.following.MOST_BYTES", len(content) // 3)
    series = int(run[1].name.rpartition("-")[2])
    try:
        for end in (len(content) // 2, len(content)):
            path.write_bytes(content[:end])
            for _ in range(6):
                follow(series)
            assert told == [json.loads(line) for line in content[:end].splitlines(keepends=True) if line[-1:] == b"\n"]
    finally:
        path.write_bytes(content)
    Following(entrance(anna), told.append)(series + 1)  # one that has no folder yet
    assert len(told) == content.count(b"\n")


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


def test_a_secure_sum_over_tls_gives_the_same_weights_and_counts_an_update_that_is_sent_again_once(
    consortium, recorder, run, tmp_path
):
    """Somebody who sees the requests sends a site's update of round 1 once more, as it was, in round 2."""
    before, seen = set(consortium.runs.glob("*")), list(pushed(recorder.streams))
    text = RUN.replace("min-sites = 2", "min-sites = 3\nsecure-sum = true")
    number = submitted(consortium.root, tmp_path / "run.toml", text)["run"]
    wait_for(lambda: rounds_in(consortium.runs, before) == 1, 200, (consortium.root.parent / "server.out").read_text)
    headers, body = next(each for each in pushed(recorder.streams) if each not in seen)
    with web(consortium) as client:  # Flower takes the headers, which are signed for five minutes
        assert client.post("/v1/fleet/push-messages", headers=headers, content=body).status_code == 200
    folder = ended(consortium, number)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    came = [(event["round"], event["site"]) for event in events if event["kind"] == "update_received"]
    assert came == [(round, site) for round in (1, 2) for site in SITES]
    np.testing.assert_allclose(parameters(folder), parameters(run[1]), rtol=0, atol=1e-6)
    for site in SITES:
        lines = (consortium.root.parent / site / "state" / "egress.jsonl").read_text().splitlines()
        trained = [json.loads(line)["body"] for line in lines if '"train"' in line][-1]
        assert {row["name"] for row in trained["left"] if row["kind"] == "vector"} == {"masked"}


def pushed(streams: list[bytes]) -> Iterator[tuple[dict[str, str], bytes]]:
    """The requests by which sites said that they have an update: headers and body."""
    for stream in streams:
        for found in re.finditer(rb"POST /v1/fleet/push-messages HTTP/1.1\r\n(.*?)\r\n\r\n", stream, re.DOTALL):
            headers = {key.lower(): value for key, value in HEADER.findall(found[1].decode())}
            body = stream[found.end() : found.end() + int(headers["content-length"])]
            if PushMessagesRequest.FromString(body).messages_list[0].metadata.message_type == "train":
                yield headers, body


def test_what_crossed_the_wire_can_be_searched_for_what_was_planted(recorder, run, tmp_path):
    """All that passed between the sites and the server, as it was before TLS, both ways. The end searches it again."""
    streams = recorder.streams
    assert sum(map(len, streams)) > 2 * 2 * len(SITES) * parameters(run[1]).nbytes  # two rounds, each way
    for said in (b"/v1/fleet/push-object", b"toy:network", *(site.encode() for site in SITES)):  # what does cross
        assert any(said in stream for stream in streams), said
    assert not any(b"data.server" in stream for stream in streams)  # which is for the server alone
    for stream in streams:
        lower = stream.lower()
        assert b"content-encoding" not in lower and b"transfer-encoding" not in lower  # so bodies stand there plainly
    for spelling in spellings(PLANTED):
        with pytest.raises(AssertionError):
            nothing_planted(tmp_path, [b"--" + spelling])
    (tmp_path / "x").write_bytes(b"--" + PLANTED.encode())
    with pytest.raises(AssertionError, match=r"^x"):
        nothing_planted(tmp_path, [])


def test_no_app_that_the_server_sent_is_unpacked_and_what_flower_starts_is_the_door(consortium, run):
    for site in SITES:
        flower = consortium.root.parent / site / "flower"
        assert door.__file__ in (flower / "bin" / "flwr-clientapp").read_text()
        assert not (flower / "apps").exists()


def test_a_key_that_is_not_registered_is_refused(consortium):
    child, lines = supernode(consortium.root.parent / "nan-30")
    try:
        assert child.wait(240), lines
        assert child.flower_code == 305
    finally:
        child.end()
    assert online(consortium.root) == set(SITES)


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
        said = connection.getresponse().read()
    except (http.client.HTTPException, OSError):
        said = b""  # hung up; nginx says what was wrong
    assert (b"plain HTTP request was sent to HTTPS port" in said) if NGINX else not said
    connection.close()


@needs_nginx
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


def test_a_site_refuses_the_app_a_killed_task_is_asked_again_and_an_error_is_told_without_its_text(
    consortium, recorder, tmp_path
):
    """One run: b-20 refuses what the coordinator brings, a-40's task is killed in the middle of round 1, and in round 2
    c-20's data raise an error that names a patient.
    """
    root = consortium.root.parent
    files = [root / name / "site.toml" for name in ("b-20", "c-20")]
    texts = [path.read_text() for path in files]
    files[0].write_text(texts[0].replace("approved-apps = []", f'approved-apps = ["{"0" * 64}"]'))
    slow = RUN.replace("toy:network", "toy:slow").replace("rounds = 2", "rounds = 2\nlocal-steps = 20")
    before = {name: recorded(root / name, "audit", "train") for name in ("a-40", "c-20")}

    def begun(site: str) -> bool:
        return recorded(root / site, "audit", "train") > before[site]

    out, text = (root / "server.out").read_text, slow.replace("min-sites = 2", "min-sites = 1")
    try:
        number = submitted(consortium.root, tmp_path / "run.toml", text)["run"]
        wait_for(lambda: begun("a-40"), 200, out)
        processes_of(runner_of(consortium, "a-40"))["worker"].send_signal(signal.SIGKILL)
        wait_for(lambda: begun("c-20"), 60, out)
        files[1].write_text(texts[1].replace('manifest = "c-20"', 'manifest = "bug-20"'))
        folder = ended(consortium, number)
    finally:
        for path, text in zip(files, texts, strict=True):
            path.write_text(text)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "degraded"
    assert [entry["joined"] for entry in result["rounds_log"]] == [["a-40", "c-20"], ["a-40"]]
    assert recorded(root / "a-40", "audit", "train") == before["a-40"] + 3  # two rounds, and once more
    said = (folder / "events.jsonl").read_text() + json.dumps(result)
    assert "not one that this site approves of (approved-apps)" in said
    assert "c-20: ZeroDivisionError in fedmed/" in said
    nothing_planted(root, recorder.streams)


@needs_nginx
def test_nginx_shows_a_renewed_certificate_and_the_sites_come_back(consortium):
    """The last test here: the SuperLink is started again."""
    address = ("127.0.0.1", consortium.consortium.port)
    certificates.make_server_certificate(consortium.tls, consortium.consortium.names, 60)
    renewed = (consortium.tls / "server.crt").read_text()
    out = consortium.root.parent / "server.out"
    wait_for(lambda: ssl.get_server_certificate(address) == renewed, 120, out.read_text)
    wait_for(lambda: "the server's certificate was renewed" in out.read_text(), 120, out.read_text)
    wait_for(lambda: online(consortium.root) == set(SITES), 240, out.read_text)
