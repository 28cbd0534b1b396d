"""What an archive answers, is not, or does not trust comes out as one line; and TLS to it, by both protocols."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from intake_files import NUMBER, named_object, pseudonyms_in
from loopback_archive import ANY, Holdings, archive_of, dimse, refusals
from proxies import proxy

from fedmed.deployment.certificates import make_authority, make_coordinator_certificate, make_server_certificate
from fedmed.errors import ConfigError, DataError
from fedmed.intake.archive import Interrupted, patiently
from fedmed.intake.dicomweb import DicomWeb
from fedmed.intake.pull import pull
from fedmed.intake.query import Query


@pytest.mark.parametrize(
    ("titles", "reason"),
    [
        ({"called": "OTHER"}, "another name than --called"),
        ({"calling": "STRANGER"}, "does not know this machine"),
    ],
)
def test_a_wrong_ae_title_is_named(titles: dict[str, str], reason: str, tmp_path: Path):
    with archive_of(Holdings(named_object())) as address, pytest.raises(DataError, match=reason):
        pull(dimse(address, **titles), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
    assert not (tmp_path / "out").exists()


def test_an_archive_that_is_not_there_and_a_query_that_finds_nothing_are_named(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    with archive_of(Holdings(named_object())) as address:
        with pytest.raises(DataError, match="nothing in the archive meets the query"):
            pull(dimse(address), Query(modalities=("MG",)), tmp_path / "out", pseudonyms)
        with pytest.raises(DataError, match="nothing in the archive meets the query"):
            pull(dimse(address), Query(accessions=("none",)), tmp_path / "out", pseudonyms)
    with refusals(), pytest.raises(DataError, match="cannot be reached"):
        pull(dimse(address), ANY, tmp_path / "out", pseudonyms, wait_s=600)  # so it was asked once


def test_patience_ends():
    asked = []

    def ask(attempt: int) -> None:
        asked.append(attempt)
        raise Interrupted("busy")

    with pytest.raises(Interrupted, match="busy"):
        patiently(ask, wait_s=0.0001)
    assert asked == [0, 1, 2, 3, 4]


class Answers(BaseHTTPRequestHandler):
    """A server that answers everything with the status in its path, or as no DICOMweb service would."""

    def do_GET(self) -> None:
        status = int(self.path.split("/")[1])
        body = b"<html>welcome</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(context: ssl.SSLContext | None = None) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "FEDMED_PACS_USER"),
        (403, "does not allow this user"),
        (404, "no DICOMweb service"),
        (400, "does not understand the search"),
        (200, "no DICOMweb service"),
        (503, "answers with status 503"),
    ],
)
def test_what_an_archive_answers_is_one_line_without_the_password(
    status: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FEDMED_PACS_USER", "anna")
    monkeypatch.setenv("FEDMED_PACS_PASSWORD", "hidden-word")
    pseudonyms, query = pseudonyms_in(tmp_path), Query(patients=(NUMBER,))
    with served() as port, pytest.raises(DataError, match=reason) as caught:
        pull(DicomWeb(f"http://127.0.0.1:{port}/{status}"), query, tmp_path / "out", pseudonyms, wait_s=0.001)
    said = str(caught.value)
    assert "hidden" not in said and "anna" not in said and NUMBER not in said and "127.0.0.1" not in said
    assert "\n" not in said


@pytest.mark.parametrize(("user", "said"), [("anna", "refuses the user name"), ("", "none is set in this shell")])
def test_a_password_that_is_not_set_is_told_from_a_wrong_one(user, said, tmp_path: Path, monkeypatch):
    for name in ("USER", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"FEDMED_PACS_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if user:
        monkeypatch.setenv("FEDMED_PACS_USER", user)
    with served() as port, pytest.raises(DataError, match=said):
        pull(DicomWeb(f"http://127.0.0.1:{port}/401"), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)


def test_a_port_without_tls_is_not_taken_for_a_wrong_certificate(tmp_path: Path):
    with served() as port, pytest.raises(DataError, match="does not speak TLS; is it http://"):
        pull(DicomWeb(f"https://127.0.0.1:{port}"), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)


def test_a_password_in_the_url_is_refused_and_so_is_what_is_no_url():
    with pytest.raises(ConfigError, match="FEDMED_PACS_PASSWORD") as caught:
        DicomWeb("https://anna:hidden-word@pacs/dicom-web")
    assert "hidden" not in str(caught.value)
    for url in ("pacs/dicom-web", "ftp://pacs", "https://"):
        with pytest.raises(ConfigError, match="expected a URL"):
            DicomWeb(url)
    with pytest.raises(ConfigError, match="no such file"):
        DicomWeb("https://pacs", ca=Path("nowhere.pem"))


def test_a_certificate_that_nobody_signed_is_named_and_ca_makes_it_trusted(tmp_path: Path):
    make_authority(tmp_path, "hospital")
    make_server_certificate(tmp_path, ["localhost"], days=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    pseudonyms = pseudonyms_in(tmp_path)
    with served(context) as port:
        with pytest.raises(DataError, match=r"TLS: .*--ca"):
            pull(DicomWeb(f"https://localhost:{port}/401"), ANY, tmp_path / "out", pseudonyms, wait_s=0.001)
        with pytest.raises(DataError, match="FEDMED_PACS_USER"):  # so it was reached
            pull(DicomWeb(f"https://localhost:{port}/401", ca=tmp_path / "ca.crt"), ANY, tmp_path / "out", pseudonyms)


def test_a_port_without_a_server_is_named(tmp_path: Path):
    with served() as port:
        pass
    with pytest.raises(DataError, match="cannot be reached"):
        pull(DicomWeb(f"http://127.0.0.1:{port}"), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=600)  # once


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital's authority, a certificate of its archive (localhost) and one of this machine; and a stranger's."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("hospital", "stranger"):
        (folder / name).mkdir()
        make_authority(folder / name, name)
        make_server_certificate(folder / name, ["localhost"], days=30)
        certificate, key = make_coordinator_certificate(folder / name, "workstation", 30)
        (folder / name / "machine.pem").write_bytes(certificate + (key or b""))
    return folder


def secured(folder: Path, *, asks: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    if asks:
        context.load_verify_locations(folder / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def by_name(address: str) -> str:
    return address.replace("127.0.0.1", "localhost")


def test_dimse_over_tls_pulls_what_it_pulls_without(certified: Path, tmp_path: Path):
    hospital = certified / "hospital"
    with archive_of(Holdings(named_object(1), named_object(2)), secured(hospital, asks=True)) as address:
        archive = dimse(by_name(address), ca=hospital / "ca.crt", certificate=hospital / "machine.pem")
        assert pull(archive, ANY, tmp_path / "out", pseudonyms_in(tmp_path)).images == 2


@pytest.mark.parametrize(
    ("ca", "certificate", "reason"),
    [
        ("stranger", "hospital", "TLS: the certificate of the archive is not trusted.*signed by 'CN=hospital.*--ca"),
        ("hospital", None, "TLS: the archive asks for a certificate of this machine.*--certificate"),
        ("hospital", "stranger", "TLS: the archive asks for a certificate of this machine that it trusts"),
    ],
)
def test_a_side_that_the_other_does_not_trust_is_refused_in_one_line(
    certified: Path, tmp_path: Path, ca: str, certificate: str | None, reason: str
):
    shown = certified / certificate / "machine.pem" if certificate else None
    with archive_of(Holdings(named_object()), secured(certified / "hospital", asks=True)) as address:
        archive = dimse(by_name(address), ca=certified / ca / "ca.crt", certificate=shown)
        with refusals(), pytest.raises(DataError, match=reason) as caught:
            pull(archive, ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, Interrupted)


def test_an_archive_that_takes_the_call_and_ends_the_search_may_not_know_this_machine(tmp_path: Path):
    """As Orthanc does for an AE title that it does not list."""
    holdings = Holdings(named_object())
    holdings.find = lambda event: event.assoc.abort() or iter(())
    with archive_of(holdings) as address, refusals(), pytest.raises(DataError, match=r"as \w+ \(--calling\)"):
        pull(dimse(address), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)


def test_a_port_without_tls_is_named(certified: Path, tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    with archive_of(Holdings(named_object())) as address:
        archive = dimse(by_name(address), ca=certified / "hospital" / "ca.crt")
        with refusals(), pytest.raises(DataError, match=r"does not speak TLS 1\.2"):
            pull(archive, ANY, tmp_path / "out", pseudonyms, wait_s=0.001)


def test_dicomweb_shows_the_same_certificate(certified: Path, tmp_path: Path):
    hospital, pseudonyms = certified / "hospital", pseudonyms_in(tmp_path)
    with served(secured(hospital, asks=True)) as port:
        url, shown = f"https://localhost:{port}/401", hospital / "machine.pem"
        archive = DicomWeb(url, ca=hospital / "ca.crt", certificate=shown)
        with pytest.raises(DataError, match="FEDMED_PACS_USER"):  # so it was reached
            pull(archive, ANY, tmp_path / "out", pseudonyms, wait_s=0.001)


def test_a_proxy_changes_nothing_of_what_tls_trusts_and_shows(
    certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hospital, pseudonyms = certified / "hospital", pseudonyms_in(tmp_path)
    with served(secured(hospital, asks=True)) as port, proxy("user:secret") as between:
        monkeypatch.setenv("HTTPS_PROXY", between.url("user:secret"))
        monkeypatch.setenv("NO_PROXY", "")
        url = f"https://localhost:{port}/401"
        archive = DicomWeb(url, ca=hospital / "ca.crt", certificate=hospital / "machine.pem")
        with pytest.raises(DataError, match="FEDMED_PACS_USER"):  # so it was reached
            pull(archive, ANY, tmp_path / "out", pseudonyms, wait_s=0.001)
        with pytest.raises(DataError, match=r"TLS: .* signed by 'CN=hospital.*--ca"):
            pull(DicomWeb(url), ANY, tmp_path / "out", pseudonyms, wait_s=0.001)
        assert between.asked == [(f"localhost:{port}", True)] * len(between.asked) != []


def test_ca_takes_the_place_of_every_other_authority(certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certified / "hospital" / "ca.crt"))
    with served(secured(certified / "hospital")) as port:
        archive = DicomWeb(f"https://localhost:{port}/401", ca=certified / "stranger" / "ca.crt")
        with pytest.raises(DataError, match=r"not trusted.*signed by 'CN=hospital"):
            pull(archive, ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)


def test_files_of_tls_that_are_missing_or_something_else_are_named(certified: Path, tmp_path: Path):
    ca = certified / "hospital" / "ca.crt"
    (tmp_path / "note.pem").write_text("no certificate")
    for settings, reason in (
        ({"ca": tmp_path / "nowhere.pem"}, "--ca .*no such file"),
        ({"ca": tmp_path / "note.pem"}, "--ca .*no certificate in PEM"),
        ({"ca": ca, "certificate": ca}, "--certificate .*without a password"),
        ({"certificate": certified / "hospital" / "machine.pem"}, "--pacs speaks with --ca alone"),
    ):
        with pytest.raises(ConfigError, match=reason):
            dimse("localhost:104", **settings)
