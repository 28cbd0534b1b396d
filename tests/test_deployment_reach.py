"""The way from a hospital to the server: proxies, authorities and clocks."""

import http.client
import http.server
import os
import ssl
import threading
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.client import ProtobufClient
from proxies import proxy
from real_consortium import free_port

from fedmed.deployment import certificates, processes, reach
from fedmed.deployment.control import ServerAway, control, nodes
from fedmed.deployment.coordinators import Entrance
from fedmed.deployment.kits import Kit
from fedmed.errors import ConfigError


@contextmanager
def tls_server(folder: Path, name: str, ahead_s: float = 0.0, days: int = 60):
    """A web server of an authority of that name, for 127.0.0.2; gives its port and the authority's certificate.

    Its clock is `ahead_s` before this machine's; a certificate of 0 days ended an hour ago.
    """
    folder.mkdir()
    certificates.make_authority(folder, name)
    certificates.make_server_certificate(folder, ["127.0.0.2"], days)
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
        sites={},
        fedmed="",
        made=datetime.now(UTC),
        content={},
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


def test_no_setting_of_the_machine_lets_a_header_say_where_a_request_comes_from(monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # as container images have it
    assert processes.flower_environment(Path())["FORWARDED_ALLOW_IPS"] == "127.0.0.1"


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


def test_a_server_whose_certificate_ended_is_refused_and_everybody_is_told_why(environment, tmp_path):
    with tls_server(tmp_path / "tls", "consortium", days=0) as (port, authority):
        with pytest.raises(ConfigError, match=r"refused \(certificate has expired\); tell the coordinator"):
            reach.certificate(kit(port, authority))
        client = ProtobufClient.from_server_address(f"127.0.0.2:{port}", False, authority, [])  # as a SuperNode has it
        with closing(client._client), pytest.raises(httpx.ConnectError, match=processes.BAD_CERTIFICATE):
            client._client.get(f"https://127.0.0.2:{port}/")
        server = Entrance(address=f"127.0.0.2:{port}", authority=tmp_path / "tls" / "ca.crt", runs=tmp_path)
        with (
            pytest.raises(ServerAway, match=r"certificate is refused \(certificate has expired\)"),
            control(server) as it,
        ):
            nodes(it)


def test_another_authority_of_the_same_name_is_no_proxy(environment, tmp_path):
    with (
        tls_server(tmp_path / "one", "consortium") as (_, authority),
        tls_server(tmp_path / "other", "consortium") as (port, _),
        pytest.raises(ConfigError, match=r"refused .* tell the coordinator"),
    ):
        reach.certificate(kit(port, authority))
