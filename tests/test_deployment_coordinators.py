"""What lets coordinators in from other machines, and gives run folders to them: certificates, lists, files."""

import asyncio
import configparser
import errno
import json
import logging
import os
import re
import shutil
import stat
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_consortium import command, make_consortium

from fedmed.cli.server import _line
from fedmed.deployment import certificates
from fedmed.deployment.consortium import read_consortium
from fedmed.deployment.continuing import awaited, continue_lost, cut_off, under_way
from fedmed.deployment.control import FlowerRun
from fedmed.deployment.coordinators import coordinators, entrance
from fedmed.deployment.guarded import SitesOnly
from fedmed.deployment.processes import descendants, flower_environment, kill
from fedmed.deployment.proxy import PLACES, Proxy, nginx_configuration
from fedmed.deployment.run_files import _checked, run_server
from fedmed.deployment.superlink import server_command
from fedmed.errors import ConfigError, RunInterrupted

ROOT = Path(__file__).parent.parent
NGINX = bool(shutil.which("nginx") or shutil.which("nginx", path=PLACES))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A server without sites that means to stand behind nginx."""
    server = make_consortium(tmp_path_factory.mktemp("made"), [])
    path = server / "consortium.toml"
    path.write_text(path.read_text().replace("loopback-port = 0", "loopback-port = 18999"))
    command("server", "provision", server)
    return server


def openssl(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)


def test_a_coordinators_certificate_stands_for_a_coordinator_and_for_no_server(made):
    command("server", "coordinator", "anna", "--server", made)
    given, ca = made / "coordinators" / "anna", made / "tls" / "ca.crt"
    assert stat.S_IMODE((given / "coordinator.key").stat().st_mode) == 0o600
    verify = ("verify", "-x509_strict", "-CAfile", ca)
    assert openssl(*verify, "-purpose", "sslclient", given / "coordinator.crt").returncode == 0
    assert openssl(*verify, "-purpose", "sslserver", given / "coordinator.crt").returncode != 0
    assert openssl(*verify, "-purpose", "sslclient", made / "tls" / "server.crt").returncode != 0
    way = entrance(given)
    assert way.address == read_consortium(made).consortium.address
    way.tls()
    (given / "coordinator.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        way.tls()


def test_a_coordinator_may_keep_its_key_and_send_a_request(made, tmp_path):
    key, request = tmp_path / "key.pem", tmp_path / "anna.csr"
    made_key = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-out", key)
    asked = openssl("req", "-new", "-key", key, "-subj", "/CN=somebody else", "-out", request)
    assert made_key.returncode == asked.returncode == 0
    command("server", "coordinator", "berta", "--server", made, "--request", request)
    given = made / "coordinators" / "berta"
    assert not (given / "coordinator.key").exists()
    certificate = certificates.read_certificate(given / "coordinator.crt")
    assert certificate.subject.rfc4514_string() == "CN=berta"
    shutil.copy(key, given / "coordinator.key")
    entrance(given).tls()  # key and certificate belong together
    request.write_bytes(request.read_bytes().replace(b"A", b"B", 40))
    with pytest.raises(ConfigError, match="request"):
        command("server", "coordinator", "berta", "--server", made, "--request", request)


@pytest.mark.parametrize("name", ["../anna", "", "a/b", ".hidden", "x" * 81, 'quote"', "new\nline", "x.crt"])
def test_a_coordinator_whose_name_is_none_is_refused(made, name):
    before = sorted(made.rglob("*"))
    with pytest.raises(ConfigError, match="cannot be called"):
        command("server", "coordinator", "--server", made, "--", name)
    assert sorted(made.rglob("*")) == before


def test_without_nginx_there_is_no_coordinator_elsewhere(tmp_path):
    command("server", "init", tmp_path / "s", "--address", "127.0.0.1")
    command("server", "provision", tmp_path / "s")
    with pytest.raises(ConfigError, match="need nginx"):
        command("server", "coordinator", "anna", "--server", tmp_path / "s")
    assert not (tmp_path / "s" / "nginx").exists()


def test_the_server_itself_listens_on_loopback_behind_nginx(made):
    path = made / "consortium.toml"
    before = path.read_text()
    path.write_text(before.replace('listen = "127.0.0.1"', 'listen = "0.0.0.0"'))
    folder = read_consortium(made)
    words = server_command(folder)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "18999"
    text = nginx_configuration(folder)
    assert f"listen 0.0.0.0:{folder.consortium.port} ssl;" in text
    assert "server 127.0.0.1:18999;" in text
    path.write_text(path.read_text().replace("loopback-port = 18999", f"loopback-port = {folder.consortium.port}"))
    with pytest.raises(ConfigError, match="loopback-port must not be port"):
        read_consortium(made)
    path.write_text(before)


def test_the_list_of_coordinators_is_what_nginx_lets_in(made):
    command("server", "coordinator", "clara", "--server", made)
    serial = certificates.read_certificate(made / "coordinators" / "clara.crt").serial_number
    digits = serial.to_bytes((serial.bit_length() + 7) // 8).hex().upper()  # as OpenSSL writes it
    line = f'"SUCCESS {digits}" 1;'
    assert line in nginx_configuration(read_consortium(made))
    command("server", "coordinator", "clara", "--server", made)  # a new certificate: the old one counts no more
    assert line not in nginx_configuration(read_consortium(made))
    damaged = made / "coordinators" / "damaged.crt"
    damaged.write_text("no certificate")
    (made / "coordinators" / "clara.crt").unlink()
    assert "clara" not in nginx_configuration(read_consortium(made))
    assert [line.partition(":")[0] for line in coordinators(read_consortium(made))[1]] == ["damaged is shut out"]
    damaged.unlink()


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_nginx_is_given_its_list_until_it_takes_it_and_says_so_once(made):
    proxy = Proxy(read_consortium(made), flower_environment(made), logging.Logger("nginx"))
    key, listed = made / "tls" / "server.key", made / "coordinators" / "dora.crt"
    content = key.read_bytes()
    try:
        proxy.start()
        assert proxy.read_again() == []
        command("server", "coordinator", "dora", "--server", made)
        assert proxy.read_again() == ["nginx read its list again"]
        key.write_bytes(b"")  # as on a full disk, or while a certificate is renewed
        listed.unlink()
        assert "tried again" in proxy.read_again()[0]
        assert proxy.read_again() == []
        key.write_bytes(content)
        assert proxy.read_again() == ["nginx read its list again"]
        assert "dora" not in (made / "nginx" / "nginx.conf").read_text()
    finally:
        key.write_bytes(content)
        proxy.end()


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_nginx_is_started_again_with_its_old_list_while_a_new_one_cannot_be_made(made, monkeypatch):
    def full_disk(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = descendants(os.getpid())
    proxy = Proxy(read_consortium(made), flower_environment(made), logging.Logger("nginx"))
    conf = made / "nginx" / "nginx.conf"
    try:
        proxy.start()
        assert proxy.look(before) == ""
        ended = proxy.pids
        monkeypatch.setattr("fedmed.deployment.proxy.write_nginx", full_disk)
        kill(ended)
        assert proxy.look(before) == "nginx ended by itself and was started again"
        assert proxy.pids and not proxy.pids & ended
        kill(proxy.pids)
        conf.unlink()
        assert "it is started again in 2 s" in proxy.look(before)
        assert proxy.look(before) == ""  # not at once
    finally:
        proxy.end()


# Run folders.


@pytest.fixture
def runs(tmp_path):
    """Two runs, and beside them what nobody may have."""
    for name in ("20261121T100000-toy-7", "20261121T110000-toy-8"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "spool").mkdir()
        (tmp_path / "runs" / name / "spool" / "message").write_text("secret")
        (tmp_path / "runs" / name / "result.json").write_text('{"status": "completed"}')
        (tmp_path / "runs" / name / "checkpoints" / "round-0001.safetensors").write_bytes(os.urandom(300_000))
        (tmp_path / "runs" / name / ".result.json.partial").write_text("half secret")
        (tmp_path / "runs" / name / ".notes").write_text("secret")
    (tmp_path / "secret.key").write_text("secret")
    (tmp_path / "runs" / "20261121T100000-toy-7" / "link").symlink_to(tmp_path / "secret.key")
    return tmp_path / "runs"


class Answer(NamedTuple):
    status: int
    content: bytes


def asked(runs: Path, path: str, client: str = "127.0.0.1", method: str = "GET", **headers: str) -> Answer:
    """What the door answers, without a network; the path as it stands on the wire, tidied up by nobody."""
    said: list[dict[str, Any]] = []

    async def flower(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"flower"})

    async def send(message):
        said.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = path.encode("utf-8", "surrogatepass")
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "scheme": "https", "query_string": b"",
        "root_path": "",
        "path": unquote(path), "raw_path": raw, "client": (client, 4000), "server": ("192.0.2.1", 8443),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    asyncio.run(SitesOnly(flower, run_server(runs))(scope, receive, send))
    return Answer(said[0]["status"], b"".join(message.get("body", b"") for message in said[1:]))


def test_runs_are_listed_with_checksums_and_without_what_is_half_written(runs):
    assert json.loads(asked(runs, "/fedmed/runs").content) == {
        "runs": ["20261121T100000-toy-7", "20261121T110000-toy-8"]
    }
    files = json.loads(asked(runs, "/fedmed/runs/20261121T100000-toy-7").content)["files"]
    assert [file["path"] for file in files] == ["checkpoints/round-0001.safetensors", "result.json"]
    assert [file["bytes"] for file in files] == [300_000, 23]
    assert asked(runs, "/fedmed/runs/none").status == 404


def test_a_file_comes_whole_or_from_any_byte_on(runs):
    path = runs / "20261121T100000-toy-7" / "checkpoints" / "round-0001.safetensors"
    place = "/fedmed/files/20261121T100000-toy-7/checkpoints/round-0001.safetensors"
    assert asked(runs, place).content == path.read_bytes()
    rest = asked(runs, place, Range="bytes=299990-")
    assert rest == (206, path.read_bytes()[-10:])


@pytest.mark.parametrize("name", [".notes", ".result.json.partial", "spool/message", "spool/../.notes"])
def test_what_is_hidden_or_on_its_way_is_not_given(runs, name):
    answer = asked(runs, f"/fedmed/files/20261121T100000-toy-7/{name}")
    assert answer.status == 404 and b"secret" not in answer.content


@pytest.mark.parametrize("client", ["198.51.100.7", "10.0.0.1", "2001:db8::1"])
def test_another_machine_gets_no_run_folder_from_the_server_itself(runs, client):
    for path in ("runs", "runs/20261121T100000-toy-7", "files/20261121T100000-toy-7/result.json"):
        answer = asked(runs, f"/fedmed/{path}", client)
        assert answer == (403, b"")


@pytest.mark.parametrize("base", ["/fedmed/files/", "/fedmed/files/20261121T100000-toy-7/", "/fedmed/runs/"])
@pytest.mark.parametrize(
    "way",
    [
        "../secret.key",
        "../../secret.key",
        "..%2f..%2fsecret.key",
        "%2e%2e/%2e%2e/secret.key",
        "..%252f..%252fsecret.key",
        "....//....//secret.key",
        "..\\..\\secret.key",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "link",
        "%00",
        "..",
        ".",
    ],
)
def test_no_path_leads_out_of_the_runs(runs, base, way):
    answer = asked(runs, base + way)
    assert answer.status in (307, 400, 404)
    assert b"secret" not in answer.content and b"root" not in answer.content


@given(st.text(max_size=60))
def test_no_text_leads_out_of_the_runs(tmp_path_factory, way):
    root = tmp_path_factory.mktemp("any")
    (root / "runs").mkdir()
    (root / "secret").write_text("secret")
    assert asked(root / "runs", f"/fedmed/files/{way}").status in (307, 400, 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_run_folders_can_only_be_read(runs, method):
    for path in ("/fedmed/runs", "/fedmed/files/20261121T100000-toy-7/result.json"):
        assert asked(runs, path, method=method).status == 405


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a\\..\\x", "./x", "a//../x"])
def test_a_server_cannot_have_a_coordinator_write_elsewhere(path):
    with pytest.raises(ConfigError, match="outside"):
        _checked({"path": path, "bytes": 1, "sha256": "0" * 64})


def test_the_example_of_nginx_configuration_is_the_one_that_is_written(tmp_path):
    """`server/nginx.conf` shows a server in /srv/chest whose name is fl.example.org, without coordinators."""
    command("server", "init", tmp_path / "chest", "--name", "chest", "--address", "fl.example.org", "--nginx")
    written = nginx_configuration(read_consortium(tmp_path / "chest")).replace(str(tmp_path), "/srv")
    assert (ROOT / "server" / "nginx.conf").read_text() == written.replace("user root;\n", "")


# Runs that go on.

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def flower_run(
    number: int, series: int, status: str, details: str = "", minutes: int | None = -5, finished: int | None = None
) -> FlowerRun:
    """A run that was taken up and has ended some minutes after noon, or has not."""
    started, ended = (None if each is None else NOON + timedelta(minutes=each) for each in (minutes, finished))
    submitted = NOON - timedelta(hours=1) if started is None else started - timedelta(minutes=1)
    return FlowerRun(
        number=number, series=series, status=status, details=details, submitted=submitted, started=started,
        finished=ended, config={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "details", "minutes", "gone"),
    [
        ("running", "", -5, True),  # of an earlier SuperLink
        ("starting", "", -5, True),
        ("running", "", 5, False),
        ("pending", "", None, False),  # it is yet to be started
        ("finished:failed", "No heartbeat received from the task", -5, True),
        ("finished:failed", "Task failed with unknown error.", 5, True),
        ("finished:failed", "ServerApp failed with exception: paused: 1 of 2 sites took part", -5, False),
        ("finished:failed", f"ServerApp failed with exception: {RunInterrupted('the disk is full')}", 5, True),
        ("finished:stopped", "", -5, False),
        ("finished:completed", "", -5, False),
    ],
)
def test_a_run_goes_on_if_its_process_is_gone_without_a_word(status, details, minutes, gone):
    run = flower_run(1, 7, status, details, minutes)
    assert cut_off([run], under_way([run], NOON)) == ([(run, 1)] if gone else [])


def test_only_a_runs_last_try_goes_on_and_counts_those_that_were_lost_before_it_in_a_row():
    tries = [flower_run(number, 7, "finished:failed") for number in range(5)]
    for count in range(1, 6):
        assert cut_off(tries[:count], []) == [(tries[count - 1], count)]
    assert cut_off([tries[0], flower_run(9, 7, "running", minutes=5)], []) == []
    assert cut_off([tries[0], flower_run(9, 7, "finished:stopped")], []) == []
    paused = flower_run(5, 7, "finished:failed", "ServerApp failed with exception: paused: 1 of 2 sites took part")
    stopped = flower_run(5, 7, "finished:stopped", minutes=-50, finished=-40)  # and resumed half an hour later
    for ended in (paused, stopped):
        assert cut_off([*tries[:3], ended, flower_run(6, 7, "finished:failed")], [])[0][1] == 1
    continued = flower_run(5, 7, "finished:stopped", minutes=-50, finished=-5)  # after the next had begun
    assert cut_off([continued, flower_run(6, 7, "finished:failed")], [])[0][1] == 2


@pytest.mark.parametrize(
    ("tries", "ago", "said"),
    [
        (4, timedelta(0), "it was 4 times in a row; fedmed server resume 4 --server {}"),
        (1, timedelta(days=8), "its last sign of life is older than 7 days; fedmed server resume 1 --server {}"),
    ],
)
def test_a_run_that_is_not_continued_any_more_is_named_with_what_to_do(made, monkeypatch, tries, ago, said):
    lost = flower_run(0, 7, "finished:failed")
    submitted = datetime.now(UTC) - ago
    every = [replace(lost, number=number, submitted=submitted) for number in range(1, tries + 1)]
    monkeypatch.setattr("fedmed.deployment.continuing.runs", lambda client: every)
    (line,) = continue_lost(None, read_consortium(made), [])  # no client: nothing may be submitted
    assert line == f"run {tries} was cut off and is not continued: {said.format(made)}"


def test_a_coordinator_elsewhere_is_told_what_to_ask_for_and_writes_paths_of_the_server(made, tmp_path, capsys):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    command("server", "coordinator", "frida", "--server", copy)
    assert "earlier" not in capsys.readouterr().out
    command("server", "coordinator", "frida", "--server", copy)
    assert "frida's earlier certificate opens nothing any more" in capsys.readouterr().out
    folder = copy / "coordinators" / "frida"
    far, near = entrance(folder), entrance(copy)
    assert f"{far.address} does not answer; its coordinator has to start it" in far.unanswered
    assert f"{near.address} does not answer; fedmed server start" in near.unanswered
    assert "fedmed server coordinator NAME" in far.refused(403) and far.refused(500) == near.refused(500)
    run = tmp_path / "run.toml"
    run.write_text('[task]\nlabels = ["a"]\n[data]\nserver = "server/manifest.csv"\n')
    with pytest.raises(ConfigError, match=r"data\.server: server/manifest\.csv is read on the server's machine"):
        command("server", "submit", run, "--server", folder)
    certificate, key = certificates.make_coordinator_certificate(copy / "tls", "frida", 0)
    (folder / "coordinator.crt").write_bytes(certificate)
    (folder / "coordinator.key").write_bytes(key)
    with pytest.raises(ConfigError, match=r"certificate ended on .*; at the server, fedmed server coordinator NAME"):
        far.tls()


def test_what_a_run_says_of_its_end_moves_no_cursor():
    ended = flower_run(1, 7, "finished:failed", "ServerApp failed with exception: \x1b[2Jno\nsite" + " more" * 99)
    said = _line(ended, "20260102T030405-a-run-7")
    what = f"a run of {ended.submitted:%Y-%m-%d %H:%M} UTC, folder 20260102T030405-a-run-7"
    assert said.startswith(f"run 1: finished:failed, {what} ({ended.details[:33]}?[2Jno site more") and len(said) < 300
    assert said.endswith(" more …)")


def test_whoever_waits_for_a_run_waits_as_long_as_the_server_would_go_on_with_it():
    tries = [flower_run(number, 7, "finished:failed", finished=number) for number in range(4)]
    full = RunInterrupted("ServerApp failed with exception: the server's disk is full")
    assert awaited([replace(tries[0], details=str(full))], NOON + timedelta(days=6))
    assert not awaited(tries[:1], NOON + timedelta(days=8))
    assert [awaited(tries[:count], NOON + timedelta(hours=1)) for count in (1, 2, 3, 4)] == [True, True, True, False]
    assert not awaited([*tries[:1], flower_run(9, 7, "finished:stopped", finished=5)], NOON + timedelta(hours=1))


def test_a_clock_that_is_set_later_cuts_off_no_run():
    """What an earlier SuperLink left is known from the first look on; a run that is taken up later is none of it."""
    left = under_way([flower_run(1, 1, "running"), flower_run(2, 2, "pending", minutes=None)], NOON)
    set_back = flower_run(2, 2, "running", minutes=-60)  # taken up after the server's clock was put back by an hour
    assert cut_off([flower_run(1, 1, "running"), set_back], left) == [(flower_run(1, 1, "running"), 1)]


# What the server is deployed with.


def test_the_unit_gives_the_server_nothing_that_it_does_not_need():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(ROOT / "server" / "fedmed-server.service")
    service = dict(unit["Service"])
    assert service["ExecStart"].split()[1:3] == ["server", "start"] and service["Restart"] == "always"
    needed = {
        "NoNewPrivileges",
        "PrivateTmp",
        "PrivateDevices",
        "ProtectHome",
        "ProtectKernelModules",
        "LockPersonality",
    }
    assert {name for name in needed if service[name] != "yes"} == set()
    assert (service["ProtectSystem"], service["CapabilityBoundingSet"], service["UMask"]) == ("strict", "", "0077")
    assert service["User"] != "root" and service["KillMode"] == "mixed"
    if shutil.which("systemd-analyze"):
        path = ROOT / "server" / "fedmed-server.service"
        words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(path)]
        rated = subprocess.run(words, capture_output=True, text=True, check=False)
        assert rated.returncode == 0, rated.stdout[-300:]
        said = (ROOT / "docs" / "deployment.md").read_text()
        score = re.search(r"exposure level for .*: ([0-9.]+)", rated.stdout)[1]
        assert re.search(rf"exposure ([0-9.]+ and )?{re.escape(score)}\b", said)


def test_the_container_is_no_root_and_publishes_one_port():
    import yaml

    (service,) = yaml.safe_load((ROOT / "server" / "compose.yaml").read_text())["services"].values()
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] == "10001"
    assert service["ports"] == ["8443:8443"] and "no-new-privileges:true" in service["security_opt"]
    lines = (ROOT / "server" / "Dockerfile").read_text().splitlines()
    assert "USER 10001" in lines and 'ENTRYPOINT ["fedmed", "server", "start", "/server"]' in lines
    assert lines.index("USER 10001") > max(place for place, line in enumerate(lines) if line.startswith("RUN"))
