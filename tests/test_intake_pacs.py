"""Pulling from a real Orthanc, filled by dcmtk's storescu: both protocols, wrong password, breaks of every kind."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from dicom_files import written
from intake_files import PLANTED, named_object, pseudonyms_in
from loopback_archive import refusals
from orthanc import MISSING, PASSWORD, USER, Orthanc
from pydicom.uid import MRImageStorage
from real_consortium import command

from fedmed.deployment.certificates import make_authority, make_coordinator_certificate, make_server_certificate
from fedmed.errors import DataError
from fedmed.intake.archive import Archive
from fedmed.intake.dicomweb import DicomWeb
from fedmed.intake.dimse import Dimse
from fedmed.intake.pull import pull
from fedmed.intake.query import Query

pytestmark = [pytest.mark.pacs, pytest.mark.skipif(MISSING, reason="orthanc, orthanc-dicomweb or dcmtk is missing")]
ANY = Query(dates="19000101-")
SERIES = 3
EACH = 6  # objects of a series


class Proxy(socketserver.ThreadingTCPServer):
    """A slow line to the archive: passes so many bytes of its answers, then holds them back until it is let go."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, port: int, at_most: int) -> None:
        super().__init__(("127.0.0.1", 0), _Line)
        self.port, self.left = port, at_most
        self.stalled, self.free = threading.Event(), threading.Event()
        self.asked: list[str] = []  # first lines of requests

    def handle_error(self, *arguments: object) -> None:
        pass  # a line that was cut


class _Line(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server: Proxy = self.server
        with socket.create_connection(("127.0.0.1", server.port)) as upstream:
            back = threading.Thread(target=self._answers, args=(upstream, server), daemon=True)
            back.start()
            while data := self.request.recv(65536):
                server.asked.append(data.split(b"\r\n", 1)[0].decode("latin-1"))
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)
            back.join()

    def _answers(self, upstream: socket.socket, server: Proxy) -> None:
        with suppress(OSError):
            while data := upstream.recv(4096):
                if server.left < 0 and not server.free.is_set():
                    server.stalled.set()
                    server.free.wait(120)
                server.left -= len(data)
                self.request.sendall(data)
        with suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)


@contextmanager
def slow_line(port: int, at_most: int) -> Iterator[Proxy]:
    with Proxy(port, at_most) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.free.set()
            proxy.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    folder = tmp_path_factory.mktemp("orthanc")
    (folder / "db").mkdir()
    archive = Orthanc(folder)
    archive.start()
    for series in range(SERIES):
        for number in range(EACH):
            tags = {"BurnedInAnnotation": "YES"} if number == 5 else {}
            tags |= {"SOPClassUID": MRImageStorage, "Modality": "MR"} if series == 2 else {}
            written(named_object(number, series=series, **tags), folder / f"{series}-{number}.dcm")
    archive.store(sorted(folder.glob("*.dcm")))
    try:
        yield archive
    finally:
        archive.kill()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMED_PACS_USER", USER)
    monkeypatch.setenv("FEDMED_PACS_PASSWORD", PASSWORD)


def archives(orthanc: Orthanc) -> dict[str, Archive]:
    return {
        "dicomweb": DicomWeb(f"http://127.0.0.1:{orthanc.web}/dicom-web"),
        "dimse": Dimse(f"127.0.0.1:{orthanc.dicom}", called="HOSPA", calling="FEDMED"),
    }


def table_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "pulled.csv").open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["image"])


def planted_in(folder: Path) -> list[str]:
    content = b"".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file()).lower()
    return [word for word in PLANTED if word.encode() in content]


def test_both_protocols_bring_the_same_images_and_none_of_the_names(orthanc: Orthanc, tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    for name, archive in archives(orthanc).items():
        pulled = pull(archive, ANY, tmp_path / name, pseudonyms)
        assert (pulled.studies, pulled.images, pulled.failed) == (1, SERIES * (EACH - 1), 0)
        assert pulled.quarantined == {"burned-in annotation, says its header": SERIES}
        assert not planted_in(tmp_path / name)
    assert table_in(tmp_path / "dicomweb") == table_in(tmp_path / "dimse")
    for row in table_in(tmp_path / "dimse"):
        assert (tmp_path / "dimse" / row["image"]).read_bytes() == (tmp_path / "dicomweb" / row["image"]).read_bytes()


@pytest.mark.parametrize(
    ("query", "images"),
    [
        (Query(modalities=("MR",)), EACH - 1),
        (Query(modalities=("MR", "DX")), SERIES * (EACH - 1)),
        (Query(dates="20240131", body_part="CHEST", description="chest zanzibarquux"), SERIES * (EACH - 1)),
        (Query(accessions=("ACC8841907", "nobody's")), SERIES * (EACH - 1)),
        (Query(patients=("MRN8841907",), modalities=("DX",)), 2 * (EACH - 1)),
    ],
)
def test_conditions_mean_the_same_to_both_protocols(orthanc: Orthanc, tmp_path: Path, query: Query, images: int):
    pseudonyms = pseudonyms_in(tmp_path)
    for name, archive in archives(orthanc).items():
        assert pull(archive, query, tmp_path / name, pseudonyms).images == images
        with pytest.raises(DataError, match="nothing in the archive"):
            pull(archive, Query(dates="19500101-19501231"), tmp_path / "none", pseudonyms)


def test_an_archive_that_asks_for_tls_and_a_certificate_gives_over_it_what_it_has(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    make_authority(tmp_path, "hospital")
    make_server_certificate(tmp_path, ["localhost"], days=30)
    shown, key = make_coordinator_certificate(tmp_path, "workstation", 30)
    (tmp_path / "machine.pem").write_bytes(shown + (key or b""))
    (tmp_path / "db").mkdir()
    written(named_object(1), tmp_path / "1.dcm")
    authority = tmp_path / "ca.crt"
    archive = Orthanc(
        tmp_path, DicomTlsEnabled=True, DicomTlsCertificate=str(tmp_path / "server.crt"),
        DicomTlsPrivateKey=str(tmp_path / "server.key"), DicomTlsTrustedCertificates=str(authority),
        DicomTlsRemoteCertificateRequired=True,
    )  # fmt: skip
    archive.start()
    try:
        machine = tmp_path / "machine.pem"
        archive.store([tmp_path / "1.dcm"], "+tls", machine, machine, "+cf", authority)
        titles = {"called": "HOSPA", "calling": "FEDMED", "ca": authority}
        trusted = Dimse(f"localhost:{archive.dicom}", **titles, certificate=machine)
        assert pull(trusted, ANY, tmp_path / "out", pseudonyms).images == 1
        stranger = Dimse(f"localhost:{archive.dicom}", **titles)
        with refusals(), pytest.raises(DataError, match="asks for a certificate of this machine"):
            pull(stranger, ANY, tmp_path / "none", pseudonyms, wait_s=0.001)
    finally:
        archive.kill()


def test_a_wrong_password_is_one_line_that_does_not_hold_it(
    orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FEDMED_PACS_PASSWORD", "hidden-word")
    with pytest.raises(DataError, match=r"FEDMED_PACS_USER .* \(401\)") as caught:
        command("data", "pull", "--dicomweb", f"http://127.0.0.1:{orthanc.web}/dicom-web", "--query", "modality=DX",
                "--keys", tmp_path / "keys", "--out", tmp_path / "out")  # fmt: skip
    assert "hidden" not in str(caught.value)


def test_a_password_of_netrc_is_taken(orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FEDMED_PACS_USER")
    netrc = tmp_path / "netrc"
    netrc.touch(mode=0o600)
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    archive = DicomWeb(f"http://127.0.0.1:{orthanc.web}/dicom-web")
    assert pull(archive, Query(modalities=("MR",)), tmp_path / "out", pseudonyms_in(tmp_path)).images == EACH - 1


def test_a_pull_that_is_killed_on_a_slow_line_goes_on_with_what_is_missing(orthanc: Orthanc, tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    out = tmp_path / "out"
    with slow_line(orthanc.web, at_most=80_000) as proxy:  # of 18 objects of 16 kB
        address = f"http://127.0.0.1:{proxy.server_address[1]}/dicom-web"
        words = ["data", "pull", "--dicomweb", address, "--query", "date=19000101-", "--keys", tmp_path / "keys",
                 "--out", out]  # fmt: skip
        child = subprocess.Popen([sys.executable, "-m", "fedmed", *map(str, words)], stderr=subprocess.DEVNULL)
        assert proxy.stalled.wait(120)
        while not (out / ".journal.jsonl").exists() or not (out / ".journal.jsonl").read_bytes().endswith(b"\n"):
            with suppress(subprocess.TimeoutExpired):  # it ends by itself only if something is wrong
                assert child.wait(0.05) is None
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        journal = (out / ".journal.jsonl").read_text().splitlines()
        assert 0 < len(journal) < SERIES * EACH and not any("done" in json.loads(line) for line in journal)
        assert not planted_in(out)  # half a series is there, and nothing that names anybody
        proxy.free.set()
        proxy.asked.clear()
        pulled = pull(DicomWeb(address), ANY, out, pseudonyms)
        single = [line for line in proxy.asked if line.startswith("GET") and line.count("/instances/") == 1]
    assert (pulled.images, pulled.quarantined.total(), pulled.failed) == (SERIES * (EACH - 1), SERIES, 0)
    assert len(single) == EACH - len(journal)
    assert len({row["image"] for row in table_in(out)}) == len(table_in(out)) == pulled.images


def test_an_archive_that_dies_and_comes_back_is_asked_again(orthanc: Orthanc, tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    out = tmp_path / "out"
    with slow_line(orthanc.web, at_most=80_000) as proxy:
        archive = DicomWeb(f"http://127.0.0.1:{proxy.server_address[1]}/dicom-web")
        came: list[object] = []
        puller = threading.Thread(target=lambda: came.append(pull(archive, ANY, out, pseudonyms, wait_s=2.0)))
        puller.start()
        assert proxy.stalled.wait(120)
        orthanc.kill()
        proxy.free.set()
        orthanc.start()
        puller.join(120)
    (pulled,) = came
    assert (pulled.images, pulled.failed) == (SERIES * (EACH - 1), 0)
