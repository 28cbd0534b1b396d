"""A hospital's side without a server: what tasks are kept from, what ends them, what the runner says and checks."""

import configparser
import http.client
import http.server
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import httpx
import pytest
import yaml
from flwr.supercore.protobuf.client import ProtobufClient
from proxies import proxy
from real_consortium import command, free_port, make_site

from fedmed.deployment import certificates, processes, reach
from fedmed.deployment.checks import check_site
from fedmed.deployment.confinement import Confinement
from fedmed.deployment.health import health_endpoint, site_facts
from fedmed.deployment.kits import Kit
from fedmed.deployment.site_folder import read_site_folder
from fedmed.errors import ConfigError

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site with keys; nobody runs."""
    folder = make_site(tmp_path_factory.mktemp("site"), "a-40")
    path = folder / "site.toml"
    text = path.read_text().replace('["toy:network"', '["toy:hanging", "toy:greedy", "toy:network"')
    path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def probe(site):
    """What tasks of that site met, tried once for all tests."""
    done = subprocess.run(
        [sys.executable, str(HERE / "task_probe.py"), str(site)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


def test_a_task_trains_and_its_answer_comes_back(probe):
    assert probe["real"][0] == "ok" and "network" in probe["real"][1]
    assert probe["ledger"]


@linux
def test_a_task_reaches_no_network(probe):
    assert not probe["reached"]
    assert "Error" in probe["tried"]["connect"] and "Error" in probe["tried"]["send"]


@linux
def test_a_task_reads_the_data_and_writes_to_its_own_folders_alone(probe):
    tried = probe["tried"]
    for act in ("write data", "remove data", "write key"):
        assert tried[act].startswith("PermissionError"), act
    assert tried["read data"] == "6"
    assert (tried["write state"], tried["rename state"]) == ("2", "renamed")
    assert tried["temporary"] == "flower/tmp"


@linux
def test_a_task_has_the_processors_that_it_was_given(probe):
    assert probe["tried"]["processors"] == "1"


@linux
def test_a_task_that_hangs_is_ended_with_rule_and_hint_and_the_log_says_where(probe):
    code, reason = probe["hangs"]
    assert code == 2 and "no progress for 2 s" in reason and reason.endswith("(task-stalls-after-s)")
    assert "toy.py" in probe["log"] and "in forward" in probe["log"]


@linux
def test_a_task_that_computes_for_ever_is_ended_at_the_deadline(probe):
    code, reason = probe["late"]
    assert code == 2 and reason.endswith("(strategy.round-timeout-s)")


@linux
def test_a_task_without_enough_memory_says_so(probe):
    code, reason = probe["memory"]
    assert code == 2 and "out of memory" in reason and "task-memory-gib" in reason


def test_a_task_that_was_killed_is_asked_again_by_the_server(probe):
    code, reason = probe["killed"]
    assert code == 8 and reason.endswith("(task.killed)")  # the code that `strategy.retries` counts


def test_a_task_without_room_on_the_disk_says_so_and_names_no_place(probe, site):
    code, reason = probe["no message"]
    assert code == 2 and reason.startswith("the site's disk is full") and reason.endswith("(task.disk)")
    code, reason = probe["no record"]
    assert code == 2 and re.search(r"\((ledger|chain)\.[a-z-]+\)$", reason), reason
    for name in ("no message", "no record"):
        assert str(site) not in probe[name][1] and ".jsonl" not in probe[name][1]
    assert probe["room again"] == probe["real"]


def test_no_task_stays(probe):
    assert not any(probe["left"])


CONFINE = """
import encodings.idna, json, os, socket, sys  # all that is needed later: a plain user may not read this Python
from pathlib import Path
from fedmed.deployment import confinement
if sys.argv[2] == "user" and os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
if sys.argv[2] == "landlock":
    confinement._own_network = lambda: ""
held = confinement.confine(writable=[Path(sys.argv[1])], memory_gib=0, processors=0)
def error(act):
    try:
        act()
        return ""
    except OSError as problem:
        return type(problem).__name__
said = {
    "held": vars(held),
    "connect": error(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), timeout=5)),
    "outside": error(lambda: Path(sys.argv[1]).parent.joinpath("x").write_bytes(b"")),
    "inside": error(lambda: Path(sys.argv[1]).joinpath("x").write_bytes(b"")),
    "uid": os.geteuid(),
}
print(json.dumps(said))
"""


@linux
@pytest.mark.parametrize("who", ["user", "landlock"])
def test_what_is_said_to_hold_does_hold_for_a_plain_user_and_where_namespaces_are_forbidden(who):
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        inside = Path(folder) / "inside"
        inside.mkdir()
        for place in (inside.parent, inside):
            place.chmod(0o777)  # so that nothing but Landlock refuses
        port = str(listener.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", CONFINE, str(inside), who, port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    held = Confinement(**said["held"])
    if not (held.network and held.files):
        pytest.skip(f"this system does not allow it: {held}")
    assert said["uid"] or who != "user"
    assert said["connect"]
    assert (said["outside"], said["inside"]) == ("PermissionError", "")


def test_what_does_not_hold_is_said(tmp_path):
    assert str(Confinement(network="", files="all", memory="1 GiB", processors="1 of 2")).startswith(
        "network: NOT limited, this system does not allow it; files: all"
    )


@contextmanager
def tls_server(folder: Path, name: str, ahead_s: float = 0.0):
    """A web server of an authority of that name, for 127.0.0.2; gives its port and the authority's certificate.

    Its clock is `ahead_s` before this machine's.
    """
    folder.mkdir()
    certificates.make_authority(folder, name)
    certificates.make_server_certificate(folder, ["127.0.0.2"], 60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")

    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("content-length", "0")
            self.end_headers()

        def date_time_string(self, timestamp=None):
            return super().date_time_string(time.time() + ahead_s)

        def log_message(self, *arguments):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that refuses our certificate

    with Server(("127.0.0.2", 0), Quiet) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.server_address[1], (folder / "ca.crt").read_bytes()
        finally:
            server.shutdown()
            thread.join()


def kit(port: int, authority: bytes) -> Kit:
    """As from a consortium whose server is at 127.0.0.2, an address that no proxy setting of ours exempts."""
    return Kit(
        consortium="c",
        site="s",
        node_key="",
        address=f"127.0.0.2:{port}",
        apps=(),
        coordinator=b"",
        certificate=authority,
    )


@pytest.fixture
def environment(monkeypatch):
    """A function: set the proxy variables, and no others."""
    for name in (
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)

    def use(url: str) -> None:
        monkeypatch.setenv("HTTPS_PROXY", url)
        exempt = processes.flower_environment(Path())["NO_PROXY"]
        monkeypatch.setenv("NO_PROXY", exempt)

    return use


def test_the_way_leads_through_the_proxy_with_its_password(environment, tmp_path):
    with tls_server(tmp_path / "tls", "consortium") as (port, authority), proxy("user:p@ss") as way:
        there = kit(port, authority)
        assert reach.proxy(there).startswith("none")
        environment(way.url("user:p%40ss"))
        assert reach.proxy(there) == f"127.0.0.1:{way.port}, with a user and password"
        assert "TLS" in reach.certificate(there)
        assert "from the server's" in reach.clock(there)
        assert set(way.asked) == {(f"127.0.0.2:{port}", True)}


def test_a_proxy_that_asks_for_a_password_is_named_without_any(environment, tmp_path):
    with tls_server(tmp_path / "tls", "consortium") as (port, authority), proxy("user:secret") as way:
        for login in ("", "user:wrong"):
            environment(way.url(login))
            with pytest.raises(ConfigError, match="HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT") as refused:
                reach.proxy(kit(port, authority))
            assert "wrong" not in str(refused.value)


def test_flowers_own_client_takes_the_same_way_and_loopback_never(environment, tmp_path):
    with tls_server(tmp_path / "tls", "consortium") as (port, authority), proxy("user:p@ss") as way:
        environment(way.url("user:p%40ss"))
        os.environ["HTTP_PROXY"] = way.url()  # `monkeypatch` removed it, and removes it again
        client = ProtobufClient.from_server_address(f"127.0.0.2:{port}", False, authority, [])
        try:
            assert client._client.get(f"https://127.0.0.2:{port}/").status_code == 404
            assert way.asked == [(f"127.0.0.2:{port}", True)]
            with pytest.raises(httpx.ConnectError):  # what a task says to its SuperNode goes nowhere else
                client._client.get(f"http://127.0.0.1:{free_port()}/")
            assert len(way.asked) == 1
        finally:
            client._client.close()
            del os.environ["HTTP_PROXY"]


def test_a_proxy_that_opens_tls_is_named(environment, tmp_path):
    with (
        tls_server(tmp_path / "tls", "consortium") as (port, authority),
        tls_server(tmp_path / "inspection", "Hospital Web Filter") as (opened, _),
    ):
        assert "TLS" in reach.certificate(kit(port, authority))
        with pytest.raises(ConfigError) as refused:
            reach.certificate(kit(opened, authority))
        assert "a proxy opens TLS here: issuer CN=Hospital Web Filter" in str(refused.value)
        assert f"exemption for 127.0.0.2:{opened}" in str(refused.value)


@pytest.mark.parametrize("ahead_s", [600, -600])
def test_a_clock_that_is_ten_minutes_off_is_found(environment, tmp_path, ahead_s):
    with (
        tls_server(tmp_path / "tls", "consortium", ahead_s) as (port, authority),
        pytest.raises(ConfigError, match=r"6\d\d s from .* \(NTP\)|59\d s from .* \(NTP\)") as refused,
    ):
        reach.clock(kit(port, authority))
    assert str(refused.value).startswith("-" if ahead_s > 0 else "+")


def test_another_authority_of_the_same_name_is_no_proxy(environment, tmp_path):
    with (
        tls_server(tmp_path / "one", "consortium") as (_, authority),
        tls_server(tmp_path / "other", "consortium") as (port, _),
        pytest.raises(ConfigError, match=r"refused .* tell the coordinator"),
    ):
        reach.certificate(kit(port, authority))


def asked(port: int, path: str = "/health") -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


def test_the_health_endpoint_says_what_the_records_say_and_names_nobody(probe, site):
    """`probe` has trained there once."""
    folder = read_site_folder(site)
    connected = True
    port = free_port()
    with health_endpoint(port, lambda: site_facts(folder, up_since="2026-01-01T00:00:00+00:00", connected=connected)):
        status, said = asked(port)
        assert status == 200
        assert (said["connected"], said["up_since"]) == (True, "2026-01-01T00:00:00+00:00")
        assert said["last_round"]["round"] == 1 and said["epsilon_left"] == 8.0 and said["problem"] is None
        assert said["last_refusal"] is None
        assert set(said["versions"]) == {"fedmed", "flwr", "torch"}
        text = json.dumps(said)
        assert not any(word in text for word in (folder.config.name, str(site), "toy", "PLANTED"))
        connected = False
        assert asked(port)[0] == 503
        assert asked(port, "/")[0] == 404
        with pytest.raises(ConfigError, match="choose another"), health_endpoint(port, dict):
            pass
    with pytest.raises(OSError), health_endpoint(0, dict):
        asked(port)


def test_records_that_are_damaged_show_in_the_health(probe, site, tmp_path):
    folder = Path(shutil.copytree(site, tmp_path / "copy"))
    (folder / "state" / "audit.jsonl").write_text("nonsense\n")
    said = site_facts(read_site_folder(folder), up_since="", connected=True)
    assert said["problem"]


def test_the_log_goes_to_syslog_or_to_stderr_if_asked(tmp_path, monkeypatch, capsys):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as system:
        system.bind(str(tmp_path / "log"))
        system.settimeout(10)
        monkeypatch.setattr(processes, "SYSLOG", str(tmp_path / "log"))
        log = processes.log_file(tmp_path / "logs", "site", "syslog")
        log.info("it connects")
        assert re.fullmatch(rb"<\d+>fedmed-site: it connects\0?", system.recv(1000))
        for handler in log.handlers:
            handler.close()
    monkeypatch.setattr(processes, "SYSLOG", str(tmp_path / "nobody"))
    with pytest.raises(ConfigError, match="journal"):
        processes.log_file(tmp_path / "logs", "site", "syslog")
    processes.log_file(tmp_path / "logs", "site", "journal").log(logging.INFO, "it connects")
    assert capsys.readouterr().err == "it connects\n"
    assert not (tmp_path / "logs").exists()


def test_the_check_shows_the_approval_and_its_end(site, tmp_path):
    folder = Path(shutil.copytree(site, tmp_path / "copy"))
    path = folder / "site.toml"
    text = path.read_text()

    def found(days: int):
        end = date.today() + timedelta(days=days)
        lines = f'[policy.approval]\npurpose = "pneumonia"\nexpires = {end}'
        path.write_text(re.sub(r"\[policy\.approval\].*?expires = \S+", lines, text, flags=re.DOTALL))
        return {each.what: each for each in check_site(folder, dry_round=False)}["approval"]

    assert found(400).ok and found(400).said.startswith("for pneumonia; until ")
    assert "ask for the next one" in found(10).said
    assert not found(-1).ok and "policy.approval.expires" in found(-1).said


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A site with real DICOM files."""
    root = tmp_path_factory.mktemp("phantoms")
    command("data", "synth", root / "data", "--sites", 1, "--patients", 12)
    command("site", "init", root / "north", "--manifest", root / "data" / "site-1" / "manifest.csv")
    command("site", "keygen", root / "north")
    return root


def test_a_dry_round_trains_on_ten_patients_and_touches_no_record(phantoms, capsys):
    capsys.readouterr()
    with pytest.raises(ConfigError, match="checks failed"):  # it has joined nobody
        command("site", "check", phantoms / "north", "--json")
    found = {each["what"]: each for each in json.loads(capsys.readouterr().out)}
    assert [what for what, each in found.items() if not each["ok"]] == ["kit"]
    assert found["manifest"]["said"].endswith("of 12 patients")
    assert found["dry round"]["said"].startswith("10 patients, ")
    assert "GiB of memory" in found["dry round"]["said"]
    assert {"device", "limits of a task", "approval", "disk", "ledger", "versions"} <= set(found)
    assert not (phantoms / "north" / "state").exists()
    assert not [path for path in (phantoms / "north" / "flower" / "tmp").rglob("*") if path.is_file()]


def test_an_image_that_cannot_be_read_is_found_by_the_dry_round(phantoms, tmp_path):
    folder = Path(shutil.copytree(phantoms / "north", tmp_path / "copy"))
    lines = (phantoms / "data" / "site-1" / "manifest.csv").read_text().splitlines()
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join([lines[0], *(line.replace(".dcm", ".gone") for line in lines[1:])]) + "\n")
    text = re.sub(r"manifest = .*", f'manifest = "{manifest}"', (folder / "site.toml").read_text())
    (folder / "site.toml").write_text(text)
    found = {each.what: each for each in check_site(folder)}
    assert not found["dry round"].ok and "cannot be read" in found["dry round"].said


def test_the_check_neither_counts_nor_opens_the_images_of_who_withdrew(phantoms, tmp_path):
    folder = Path(shutil.copytree(phantoms / "north", tmp_path / "copy"))
    source = phantoms / "data" / "site-1"
    header, *lines = (source / "manifest.csv").read_text().splitlines()
    place = header.split(",").index("image")
    cells = [line.split(",") for line in lines]
    gone = list(dict.fromkeys(line[0] for line in cells))[:2]
    for line in cells:  # an image that is not there would fail the dry round
        line[place] = "withdrawn.dcm" if line[0] in gone else str(source / line[place])
    manifest, listed = tmp_path / "manifest.csv", folder / "withdrawn.csv"
    manifest.write_text("\n".join([header, *map(",".join, cells)]) + "\n")
    text = re.sub(r"manifest = .*", f'manifest = "{manifest}"', (folder / "site.toml").read_text())
    (folder / "site.toml").write_text(text.replace('opt-out = ""', 'opt-out = "withdrawn.csv"'))
    found = {each.what: each for each in check_site(folder)}
    assert not found["manifest"].ok and "withdrew cannot be read" in found["manifest"].said
    assert "\n" not in found["manifest"].said and "dry round" not in found
    listed.write_text("\n".join(["patient_id", *gone]) + "\n")
    found = {each.what: each for each in check_site(folder)}
    assert found["manifest"].said.endswith("of 10 patients; 2 more withdrew (opt-out)")
    assert found["dry round"].ok and found["dry round"].said.startswith("10 patients, ")
    listed.write_text("\n".join(["patient_id", *(line[0] for line in cells)]) + "\n")
    assert "opted out" in {each.what: each for each in check_site(folder)}["manifest"].said


CLIENT = ROOT / "client"


@pytest.mark.parametrize("name", ["fedmed-site.service", "fedmed-site.user.service"])
def test_the_units_start_the_command_and_start_it_again(name):
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string((CLIENT / name).read_text())
    service = unit["Service"]
    assert re.fullmatch(r"\S+/bin/fedmed site start \S+", service["ExecStart"])
    assert (service["Restart"], service["RestartSec"], service["NoNewPrivileges"]) == ("always", "15", "yes")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_system_unit_is_as_hardened_as_the_page_says():
    page = (ROOT / "docs" / "security-for-hospitals.md").read_text()
    (said,) = re.findall(r"exposure (\d\.\d)", page)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(CLIENT / "fedmed-site.service")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f"Overall exposure level for fedmed-site.service: {said}" in done.stdout, done.stdout + done.stderr


def test_the_container_publishes_no_port_and_writes_to_the_site_alone():
    (site,) = yaml.safe_load((CLIENT / "compose.yaml").read_text())["services"].values()
    assert "ports" not in site and site["read_only"] and site["cap_drop"] == ["ALL"]
    assert site["security_opt"] == ["no-new-privileges:true"] and site["user"] != "0"
    assert [volume for volume in site["volumes"] if not volume.endswith(":ro")] == ["./site:/site"]


def test_the_image_is_built_from_the_wheelhouse_alone_and_runs_as_no_root():
    text = re.sub(r"\\\n", " ", (CLIENT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert {step[0] for step in steps} <= {"ARG", "FROM", "COPY", "RUN", "USER", "WORKDIR", "ENTRYPOINT"}
    (run,) = (step[1] for step in steps if step[0] == "RUN")
    assert run.count("pip install") == run.count("--no-index") == 2 and "--require-hashes" in run
    assert [step[1] for step in steps if step[0] == "USER"] == ["10001"]
    assert json.loads(next(step[1] for step in steps if step[0] == "ENTRYPOINT"))[:3] == ["fedmed", "site", "start"]
