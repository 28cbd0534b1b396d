"""The processes at a hospital: what ends with what, what is started again, and what their log says."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.supercore.heartbeat import HeartbeatFailure, HeartbeatSender
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedmed.deployment import door, launcher, node, processes
from fedmed.deployment.launcher import Launcher
from fedmed.deployment.supernode import LONGEST_REST_S, WHY, _why, rest_s
from fedmed.errors import ConfigError


def test_a_process_that_dies_again_and_again_is_started_ever_more_seldom():
    rests = [0.0]
    for _ in range(12):
        rests.append(rest_s(2.0, rests[-1]))
    assert rests[:5] == [0, 1, 2, 4, 8] and rests[-1] == LONGEST_REST_S
    assert rest_s(3600.0, 64.0) == 0


HEARTBEAT = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import flwr.supernode.cli as flower
from fedmed.deployment import door, node
def supernode():
    threading.Thread(target=lambda: 1 / 0).start()
    time.sleep(60)
flower.flower_supernode = supernode
node.joined_kit, node.clock_ahead_s = (lambda site: None), (lambda kit: 0.0)
Path(sys.argv[1], door.SOCKET).touch()
node.main(SimpleNamespace(flower=Path(sys.argv[1])))
"""


def test_a_supernode_whose_heartbeat_fails_ends_and_does_not_go_on_half_alive(tmp_path):
    words = [sys.executable, "-c", HEARTBEAT, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


class Slow(BaseHTTPRequestHandler):
    """A server that answers everything after a second, with an empty message."""

    def do_POST(self) -> None:
        time.sleep(1)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None: ...


def test_a_piece_of_an_update_has_longer_than_any_other_question(monkeypatch):
    """What a line has not carried yet may lie in a proxy's buffer: it seems sent, and no answer comes."""
    monkeypatch.setattr(FleetHttpClient, "PushObject", FleetHttpClient.PushObject)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    client = FleetHttpClient(f"http://127.0.0.1:{server.server_port}", timeout=0.3)
    try:
        with pytest.raises(httpx.ReadTimeout):
            client.PushObject(PushObjectRequest())
        node.keep_pushing()
        client.PushObject(PushObjectRequest())
        with pytest.raises(httpx.ReadTimeout):
            client.PullObject(PullObjectRequest())
    finally:
        server.shutdown()
        server.server_close()


def test_a_door_whose_launcher_is_gone_ends_and_so_tells_the_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(door.SOCKET)
        listener.listen()
        start = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
        words = [sys.executable, "-I", "-S", door.__file__, str(tmp_path), "--token", "x"]
        with subprocess.Popen([sys.executable, "-c", start, *words]) as launching:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100).endswith(b'"--token", "x"]\n')
                launching.kill()
                connection.settimeout(20)
                assert connection.recv(1) == b""


def test_a_process_that_cannot_be_killed_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(processes, "KILL_S", 0.2)
    with subprocess.Popen(["sleep", "30"]) as stuck, subprocess.Popen(["sleep", "30"]) as other:
        kill = os.kill
        monkeypatch.setattr(os, "kill", lambda pid, number: kill(pid, 0 if pid == stuck.pid else number))
        started = time.monotonic()
        processes.kill({stuck.pid, other.pid})
        assert time.monotonic() - started < 10
        assert stuck.poll() is None and other.poll() is not None
        kill(stuck.pid, signal.SIGKILL)


def test_a_launcher_that_proc_hides_is_not_gone(monkeypatch):
    own, words = Launcher(os.getpid()), {"here": b"python\0flower-superexec\0"}
    monkeypatch.setattr(launcher, "descendants", lambda pid: list(words))
    real = launcher._words
    monkeypatch.setattr(launcher, "_words", words.get)
    assert not own.gone()
    monkeypatch.setattr(launcher, "_words", real)
    words["999999999"] = words.pop("here")  # /proc has no such process: as if it were hidden
    assert not any(own.gone() for _ in range(5))
    monkeypatch.setattr(launcher, "descendants", lambda pid: [])
    assert [own.gone() for _ in range(3)] == [False, False, True]


def test_a_heartbeat_that_is_answered_with_an_error_is_sent_again(monkeypatch):
    monkeypatch.setattr(HeartbeatSender, "_heartbeat", HeartbeatSender._heartbeat)  # put back afterwards
    node.keep_beating()
    answers = iter([500, 429, 200])

    def beat() -> bool:
        request = httpx.Request("POST", "https://server/")
        httpx.Response(next(answers), request=request).raise_for_status()
        return True

    sender = HeartbeatSender(beat)
    for _ in range(2):
        with pytest.raises(HeartbeatFailure):
            sender._heartbeat()
    sender._heartbeat()


def test_the_log_rotates_and_keeps_five_files(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOG_BYTES", 1000)
    log = processes.log_file(tmp_path / "logs", "site")
    for number in range(500):
        log.info("line %d", number)
    log.handlers[0].close()
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["site.log", *(f"site.log.{count}" for count in range(1, 5))]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert "line 499" in files[0].read_text()


@pytest.mark.parametrize("code", [*WHY, 1, None])
def test_why_a_supernode_ended_is_told_in_a_sentence(code):
    told = _why(SimpleNamespace(bad_certificate=False, flower_code=code))
    assert {302: "node.key", 305: "this site's key", 603: "certificate", 606: "version"}.get(code, "") in told
    assert ("logs/site.log" in told, "lost the server" in told) == (code == 1, code is None)
    assert "certificate is refused" in _why(SimpleNamespace(bad_certificate=True, flower_code=code))


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
