"""Pulling from an archive of pynetdicom's on loopback; a real one is in test_intake_pacs."""

from __future__ import annotations

import csv
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from intake_files import NAME, NUMBER, PLANTED, named_object, pseudonyms_in
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, JPEGLSLossless
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
from real_consortium import command

from fedmed.deployment.certificates import make_authority, make_server_certificate
from fedmed.errors import ConfigError, DataError
from fedmed.intake.archive import Interrupted, patiently
from fedmed.intake.dicomweb import DicomWeb
from fedmed.intake.dimse import FIND, GET, Dimse
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.pull import pull
from fedmed.intake.query import Query, Series, meets, parse_query, questions
from fedmed.privacy.keys import read_keys

ANY = Query(dates="19000101-")


class Holdings:
    """An archive's objects, and how it misbehaves."""

    def __init__(self, *objects: Dataset) -> None:
        self.objects = list(objects)
        self.sent: list[str] = []
        self.breaks_after = -1  # objects, then the association is aborted

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        level = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
        seen = set()
        for ds in self.objects:
            if not all(str(ds.get(key.keyword, "")) == str(key.value) for key in asked if self._is_key(key)):
                continue
            if (uid := ds[level[asked.QueryRetrieveLevel]].value) not in seen:
                seen.add(uid)
                answer = Dataset()
                for key in asked:
                    setattr(answer, key.keyword, ds.get(key.keyword, ""))
                answer.QueryRetrieveLevel = asked.QueryRetrieveLevel
                yield 0xFF00, answer

    @staticmethod
    def _is_key(key: object) -> bool:
        unique = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID", "AccessionNumber")
        return bool(key.value) and key.keyword in unique

    def get(self, event: evt.Event) -> Iterator[object]:
        asked = event.identifier
        wanted = [
            ds
            for ds in self.objects
            if all(str(ds.get(key.keyword)) == key.value for key in asked if self._is_key(key))
        ]
        yield len(wanted)
        for number, ds in enumerate(wanted):
            if number == self.breaks_after:
                event.assoc.abort()
                return
            self.sent.append(str(ds.SOPInstanceUID))
            yield 0xFF00, ds


@contextmanager
def archive_of(holdings: Holdings) -> Iterator[str]:
    """Its address."""
    entity = AE(ae_title="ARCHIVE")
    entity.require_called_aet = True
    entity.require_calling_aet = ["FEDMED"]
    entity.add_supported_context(FIND)
    entity.add_supported_context(GET)
    for kind in {str(ds.SOPClassUID) for ds in holdings.objects}:
        entity.add_supported_context(kind, ALL_TRANSFER_SYNTAXES, scu_role=True, scp_role=True)
    server = entity.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[(evt.EVT_C_FIND, holdings.find), (evt.EVT_C_GET, holdings.get)],
    )
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def dimse(address: str, *, called: str = "ARCHIVE", calling: str = "FEDMED") -> Dimse:
    return Dimse(address, called=called, calling=calling)


def table_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "pulled.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def everything_in(folder: Path) -> bytes:
    return b"".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file()).lower()


def test_pulls_deidentified_images_in_the_syntax_they_are_stored_in(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    report = named_object(1, series=2, SOPClassUID=BasicTextSRStorage, Modality="SR", PixelData=None)
    holdings = Holdings(
        named_object(1), named_object(2, syntax=JPEGLSLossless), named_object(3, BurnedInAnnotation="YES"), report
    )
    out = tmp_path / "out"
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, out, pseudonyms)
    assert (pulled.studies, pulled.images, pulled.failed) == (1, 2, 0)
    assert pulled.quarantined == {"burned-in annotation, says its header": 1}
    assert pulled.left_out == {"a report, not an image": 1}
    assert "1 quarantined (1 × burned-in annotation" in str(pulled)
    rows = table_in(out)
    assert [row["patient_id"] for row in rows] == [pseudonyms.patient(NUMBER)] * 2
    assert all((out / row["image"]).exists() and row["view"] == "PA" for row in rows)
    assert not any(word.encode() in everything_in(out) for word in PLANTED)
    assert not list((out / ".incoming").iterdir())


def test_pulling_again_asks_for_nothing_that_is_there(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    holdings = Holdings(named_object(1), named_object(2, series=2))
    with archive_of(holdings) as address:
        first = pull(dimse(address), ANY, tmp_path / "out", pseudonyms)
        holdings.sent.clear()
        holdings.objects.append(named_object(3, series=3))
        second = pull(dimse(address), ANY, tmp_path / "out", pseudonyms)
    assert first.images == 2 and second.images == 3
    assert holdings.sent == ["1.2.3.8841907.1.3.3"]


def test_a_broken_series_is_completed_object_by_object(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    holdings = Holdings(*(named_object(number) for number in range(5)))
    holdings.breaks_after = 3  # a series breaks off, single objects come
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, tmp_path / "out", pseudonyms, wait_s=0.01)
    assert pulled.images == 5 and pulled.failed == 0
    assert sorted(holdings.sent) == sorted({str(ds.SOPInstanceUID) for ds in holdings.objects})  # each once


def test_an_archive_that_gives_nothing_ends_the_pull_and_the_next_one_goes_on(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    holdings = Holdings(*(named_object(1, series=number) for number in range(2)))
    holdings.breaks_after = 0
    with archive_of(holdings) as address:
        with pytest.raises(DataError, match="the same command goes on from there"):
            pull(dimse(address), ANY, tmp_path / "out", pseudonyms, wait_s=0.001)
        holdings.breaks_after = -1
        assert pull(dimse(address), ANY, tmp_path / "out", pseudonyms).images == 2


def test_an_object_that_cannot_be_parsed_is_counted_and_not_asked_for_again(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    broken = named_object(2)
    del broken.Rows
    holdings = Holdings(named_object(1), broken)
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, tmp_path / "out", pseudonyms)
        assert (pulled.images, pulled.unreadable) == (1, 1)
        holdings.sent.clear()
        assert str(pull(dimse(address), ANY, tmp_path / "out", pseudonyms)) == str(pulled)
    assert not holdings.sent


def test_values_that_no_header_may_have_make_nobody_quote_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    odd = named_object(1, BodyPartExamined="thorax of Wilhelmina", Modality="dx of Quisling", StudyDate="in 1934")
    with archive_of(Holdings(odd)) as address:
        pulled = pull(dimse(address), Query(accessions=("ACC8841907",)), tmp_path / "out", pseudonyms_in(tmp_path))
    assert pulled.images == 1  # a warning would have been an error
    assert not any(word in "".join(capfd.readouterr()).lower() for word in PLANTED)


def test_a_torn_journal_line_loses_nothing(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    holdings = Holdings(*(named_object(number) for number in range(3)))
    out = tmp_path / "out"
    with archive_of(holdings) as address:
        pull(dimse(address), ANY, out, pseudonyms)
        journal = (out / ".journal.jsonl").read_bytes().splitlines(keepends=True)
        (out / ".journal.jsonl").write_bytes(b"".join(journal[:2]) + journal[2][:40])  # killed in the third line
        holdings.sent.clear()
        assert pull(dimse(address), ANY, out, pseudonyms).images == 3
    assert len(holdings.sent) == 1 and len(table_in(out)) == 3


def test_two_pulls_into_one_folder_at_once_are_refused(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    holdings = Holdings(named_object(1), named_object(2))
    refused: list[str] = []

    def again(done: int, total: int) -> None:
        with pytest.raises(DataError, match="another pull is writing there"):
            pull(dimse(address), ANY, tmp_path / "out", pseudonyms)
        refused.append("once")

    with archive_of(holdings) as address:
        assert pull(dimse(address), ANY, tmp_path / "out", pseudonyms, progress=again).images == 2
    assert refused == ["once"]


def test_bytes_come_no_faster_than_they_may(tmp_path: Path):
    holdings = Holdings(*(named_object(number) for number in range(4)))
    size = len(holdings.objects[0].PixelData) / 1e6  # MB
    began = time.monotonic()
    with archive_of(holdings) as address:
        pull(dimse(address), ANY, tmp_path / "out", pseudonyms_in(tmp_path), megabytes_per_s=10 * size)
    assert time.monotonic() - began >= 0.4


def test_what_a_person_moved_out_of_quarantine_is_in_the_next_table(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    out = tmp_path / "out"
    with archive_of(Holdings(named_object(1, BurnedInAnnotation="YES"))) as address:
        assert pull(dimse(address), ANY, out, pseudonyms).images == 0
        with (out / "quarantine.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        (out / row["image"]).parent.mkdir(parents=True)
        (out / row["file"]).rename(out / row["image"])
        pulled = pull(dimse(address), ANY, out, pseudonyms)
    assert pulled.images == 1 and not pulled.quarantined
    assert [line["image"] for line in table_in(out)] == [row["image"]]


def test_the_summary_and_quarantine_csv_agree_on_what_was_released_and_what_was_removed(tmp_path: Path):
    pseudonyms, out = pseudonyms_in(tmp_path), tmp_path / "out"
    burned = [named_object(number, BurnedInAnnotation="YES") for number in (2, 3, 4)]

    def states() -> list[str]:
        with (out / "quarantine.csv").open(newline="") as file:
            return [row["now"] for row in csv.DictReader(file)]

    with archive_of(Holdings(named_object(1), *burned)) as address:
        pull(dimse(address), ANY, out, pseudonyms)
        assert states() == ["in quarantine"] * 3
        with (out / "quarantine.csv").open(newline="") as file:
            released, removed, _ = csv.DictReader(file)
        (out / released["file"]).rename(out / released["image"])
        (out / removed["file"]).unlink()
        pulled = pull(dimse(address), ANY, out, pseudonyms)
        assert states() == ["released", "removed by hand", "in quarantine"]
        assert (pulled.images, pulled.quarantined.total(), pulled.removed) == (2, 1, 1)
        shutil.rmtree(out / "images")  # who withdrew
        again = str(pull(dimse(address), ANY, out, pseudonyms))
    assert states() == ["removed by hand", "removed by hand", "in quarantine"]
    assert " 0 images, 1 quarantined" in again and again.endswith(", 3 removed by hand, 0 series failed")
    assert "no images" not in again
    assert (out / "quarantine.csv").stat().st_mode & 0o077 == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from fedmed.intake import pull as pulling
from fedmed.intake.dimse import Dimse
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.query import Query
from fedmed.privacy.keys import read_keys
address, out, keys, calls = sys.argv[1:]
left = [int(calls)]
def dying(name, call):
    def wrapper(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    setattr(os, name, wrapper)
for name in ("fsync", "replace", "open"):
    dying(name, getattr(os, name))
archive = Dimse(address, called="ARCHIVE", calling="FEDMED")
pulling.pull(archive, Query(dates="19000101-"), Path(out), Pseudonyms(keys=read_keys(Path(keys))))
"""


@pytest.mark.parametrize("calls", [3, 8])
def test_a_pull_killed_at_any_write_goes_on_to_the_same_images(tmp_path: Path, calls: int):
    pseudonyms = pseudonyms_in(tmp_path)
    objects = [named_object(number, series=series) for series in range(2) for number in range(2)]
    objects[3].BurnedInAnnotation = "YES"
    with archive_of(Holdings(*objects)) as address:
        whole = pull(dimse(address), ANY, tmp_path / "whole", pseudonyms)
        arguments = [address, tmp_path / "out", tmp_path / "keys", calls]
        child = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], timeout=120, check=False)
        assert child.returncode == -signal.SIGKILL
        assert not any(word.encode() in everything_in(tmp_path / "out") for word in PLANTED)
        assert pull(dimse(address), ANY, tmp_path / "out", pseudonyms) == whole
    assert sorted(row["image"] for row in table_in(tmp_path / "out")) == sorted(
        row["image"] for row in table_in(tmp_path / "whole")
    )
    for row in table_in(tmp_path / "whole"):
        assert (tmp_path / "out" / row["image"]).read_bytes() == (tmp_path / "whole" / row["image"]).read_bytes()


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pynetdicom leaves a refused socket
def test_an_archive_that_is_not_there_and_a_query_that_finds_nothing_are_named(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    with archive_of(Holdings(named_object())) as address:
        with pytest.raises(DataError, match="nothing in the archive meets the query"):
            pull(dimse(address), Query(modalities=("MG",)), tmp_path / "out", pseudonyms)
        with pytest.raises(DataError, match="nothing in the archive meets the query"):
            pull(dimse(address), Query(accessions=("none",)), tmp_path / "out", pseudonyms)
    with pytest.raises(Interrupted, match="cannot be reached"):
        pull(dimse(address), ANY, tmp_path / "out", pseudonyms, wait_s=0.001)


def test_the_command_prints_one_line_and_makes_the_sites_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    holdings = Holdings(
        named_object(1), named_object(2, PatientID="other", AccessionNumber="9", StudyInstanceUID="1.2")
    )
    table = tmp_path / "list.csv"
    table.write_text(f"note;accession\n{NAME};ACC8841907\n;\n")
    with archive_of(holdings) as address:
        command("data", "pull", "--pacs", address, "--called", "ARCHIVE", "--calling", "FEDMED", "--list", table,
                "--query", "modality=DX,CR", "--keys", tmp_path / "keys", "--out", tmp_path / "out")  # fmt: skip
    assert capsys.readouterr().out == "1 of 1 accessions found, 1 studies, 1 images, 0 quarantined, 0 series failed\n"
    pseudonyms = Pseudonyms(keys=read_keys(tmp_path / "keys"))
    assert table_in(tmp_path / "out")[0]["accession"] == pseudonyms.accession("ACC8841907")


@pytest.mark.parametrize(("column", "known"), [("accession", "ACC8841907"), ("patient", NUMBER)])
def test_what_of_a_list_is_not_in_the_archive_is_counted_and_told_to_the_site_alone(
    tmp_path: Path, column: str, known: str
):
    table, out, pseudonyms = tmp_path / "list.csv", tmp_path / "out", pseudonyms_in(tmp_path)
    table.write_text(f"{column}\n0017\n{known}\n99\n")
    with archive_of(Holdings(named_object(1), named_object(2, series=2))) as address:
        pulled = pull(dimse(address), parse_query("", table), out, pseudonyms)
        assert str(pulled).startswith(f"1 of 3 {column}s found, 1 studies, 2 images") and "0017" not in str(pulled)
        assert (out / "not-found.csv").read_text() == f"{column}\n0017\n99\n"
        assert (out / "not-found.csv").stat().st_mode & 0o077 == 0
        with pytest.raises(DataError, match=f"meets the query .0 of 2 {column}s found"):
            pull(dimse(address), parse_query("", out / "not-found.csv"), out, pseudonyms)
        table.write_text(f"{column}\n{known}\n")
        assert pull(dimse(address), parse_query("", table), out, pseudonyms).listed == f"1 of 1 {column}s found"
    assert not (out / "not-found.csv").exists()


def test_the_keys_of_a_site_toml_are_taken(tmp_path: Path):
    command("site", "init", tmp_path / "north")
    command("site", "keygen", tmp_path / "north")
    with archive_of(Holdings(named_object())) as address:
        command("data", "pull", "--pacs", address, "--called", "ARCHIVE", "--calling", "FEDMED",
                "--query", "modality=DX", "--site", tmp_path / "north", "--out", tmp_path / "out")  # fmt: skip
    pseudonyms = Pseudonyms(keys=read_keys(tmp_path / "north" / "keys"))
    assert table_in(tmp_path / "out")[0]["patient_id"] == pseudonyms.patient(NUMBER)


def test_series_that_did_not_come_end_the_command_with_an_error(tmp_path: Path):
    holdings = Holdings(named_object(1), *(named_object(2, series=number) for number in (2, 3)))
    lost = holdings.get

    def get(event: evt.Event) -> Iterator[object]:
        if str(event.identifier.SeriesInstanceUID).endswith(".2"):
            yield 0
            yield 0xA702, None
        else:
            yield from lost(event)

    holdings.get = get
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
        assert (pulled.images, pulled.failed) == (2, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modality=dx,CR", Query(modalities=("DX", "CR"))),
        ('date=20240101-20241231 description="chest pa"', Query(dates="20240101-20241231", description="chest pa")),
        ("body-part=chest date=20240131", Query(body_part="CHEST", dates="20240131")),
    ],
)
def test_a_query_is_read_as_written(text: str, expected: Query):
    assert parse_query(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing says what to pull"),
        ("modalty=DX", "did you mean modality="),
        ("chest", "expected modality="),
        ("date=2024", "date is a day"),
        ("modality=DX modality=CR", "stands there twice"),
        ('description="chest', "quotation mark"),
    ],
)
def test_a_misspelt_query_is_refused(text: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        parse_query(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id\n1\n", 'one column "accession" or "patient"'),
        ("accession,patient\n1,2\n", 'one column "accession" or "patient"'),
        ("accession\n\n", "is empty"),
        ("patient\nAB*\n", "pattern"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(text: str, reason: str, tmp_path: Path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=reason):
        parse_query("", tmp_path / "list.csv")


def test_lists_are_asked_for_one_by_one_and_other_conditions_hold_as_well(tmp_path: Path):
    (tmp_path / "list.csv").write_text("\ufeffPatient\n7\n8\n7\n", encoding="utf-8")
    query = parse_query("modality=DX date=20240131", tmp_path / "list.csv")
    assert questions(query) == [
        {"StudyDate": "20240131", "PatientID": "7"},
        {"StudyDate": "20240131", "PatientID": "8"},
    ]
    series = Series(study="1", series="2", modality="CT", body_part=None, description="")
    assert not meets(query, series)


def test_a_series_meets_a_query_by_words_in_any_order_and_by_what_the_archive_does_not_say():
    series = Series(study="1", series="2", modality="DX", body_part=None, description="Thorax  PA  im Stehen")
    assert meets(Query(description="pa thorax", body_part="CHEST", modalities=("DX",)), series)
    assert not meets(Query(description="pa abdomen"), series)


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
        pull(DicomWeb(f"http://127.0.0.1:{port}"), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
