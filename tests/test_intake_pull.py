"""Pulling from an archive of pynetdicom's on loopback; a real one is in test_intake_pacs."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from intake_files import NUMBER, PLANTED, named_object, pseudonyms_in
from loopback_archive import ANY, Holdings, archive_of, dimse, everything_in, table_in
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, JPEGLSLossless
from pynetdicom import evt

from fedmed.errors import DataError
from fedmed.intake.archive import SERIES, STUDY, Interrupted
from fedmed.intake.journal import incomplete
from fedmed.intake.pull import pull
from fedmed.intake.query import Query


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


def test_an_archive_that_answers_nothing_ends_the_pull_and_the_next_one_goes_on(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    holdings = Holdings(*(named_object(1, series=number) for number in range(2)))
    holdings.silent = True
    with archive_of(holdings) as address:
        with pytest.raises(DataError, match="the same command goes on from there"):
            pull(dimse(address), ANY, tmp_path / "out", pseudonyms, wait_s=0.001)
        holdings.silent = False
        assert pull(dimse(address), ANY, tmp_path / "out", pseudonyms).images == 2


def test_objects_that_an_archive_lists_and_never_sends_keep_nothing_else_from_coming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fedmed.intake.pull.ATTEMPTS", 2)
    holdings = Holdings(*(named_object(number, series=series) for series in range(5) for number in (1, 2)))
    holdings.lost = [f"1.2.3.8841907.1.{series}.1" for series in range(4)]  # the first of each series
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
    assert (pulled.images, pulled.failed) == (6, 4)


class Index:
    """An archive that lists 10 series of 100 objects each, and can send none."""

    asked = 0

    def studies(self, question, patience):
        return (dict.fromkeys(STUDY, "") | {"StudyInstanceUID": f"1.{number}"} for number in range(10))

    def series_of(self, study, patience):
        about = {"SeriesInstanceUID": f"2.{study}", "Modality": "CT", "NumberOfSeriesRelatedInstances": "100"}
        return [dict.fromkeys(SERIES, "") | about]

    def objects(self, series):
        return [f"{series.series}.{number}" for number in range(100)]

    def fetch(self, series, take):
        self.asked += 1
        raise Interrupted("the archive did not send everything")

    def fetch_object(self, series, uid, take):
        self.fetch(series, take)


def test_an_archive_that_only_lists_is_soon_believed(tmp_path: Path):
    archive = Index()
    pulled = pull(archive, ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
    assert (pulled.images, pulled.failed) == (0, 10) and archive.asked <= 3 * 5 * 4 + 7 * 4


def test_a_series_that_grew_after_it_was_pulled_is_completed(tmp_path: Path):
    pseudonyms, out = pseudonyms_in(tmp_path), tmp_path / "out"
    holdings = Holdings(named_object(1), named_object(2))
    with archive_of(holdings) as address:
        for number in (3, 4):
            pull(dimse(address), ANY, out, pseudonyms)
            holdings.objects.append(named_object(number))
            holdings.sent.clear()
            assert pull(dimse(address), ANY, out, pseudonyms).images == len(table_in(out)) == number
            assert holdings.sent == [f"1.2.3.8841907.1.1.{number}"]


def test_an_object_that_cannot_be_read_is_counted_and_every_pull_asks_for_it_once_more(tmp_path: Path):
    pseudonyms, out = pseudonyms_in(tmp_path), tmp_path / "out"
    broken = named_object(2)
    del broken.Rows
    holdings = Holdings(named_object(1), broken, named_object(3))
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, out, pseudonyms)
        assert (pulled.images, pulled.unreadable, pulled.failed) == (2, 1, 0)
        assert len(incomplete(out)) == 1
        holdings.sent.clear()
        assert str(pull(dimse(address), ANY, out, pseudonyms)) == str(pulled)
        assert holdings.sent == ["1.2.3.8841907.1.1.2"]
        holdings.objects[1] = named_object(2)  # the fault has passed
        pulled = pull(dimse(address), ANY, out, pseudonyms)
        assert (pulled.images, pulled.unreadable) == (3, 0) and not incomplete(out)
        holdings.sent.clear()
        assert pull(dimse(address), ANY, out, pseudonyms) == pulled
    assert not holdings.sent


def test_an_object_that_is_torn_once_on_its_way_is_asked_for_again_at_once(tmp_path: Path):
    holdings = Holdings(named_object(1), named_object(2))
    del holdings.objects[1].PixelData  # as a line that breaks leaves it
    sent = holdings.get

    def get(event: evt.Event) -> Iterator[object]:
        yield from sent(event)
        holdings.objects[1] = named_object(2)

    holdings.get = get
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, tmp_path / "out", pseudonyms_in(tmp_path))
    assert (pulled.images, pulled.unreadable, pulled.failed, pulled.quarantined.total()) == (2, 0, 0, 0)


def test_a_study_or_series_of_which_the_archive_tells_nothing_keeps_nothing_else_from_coming(tmp_path: Path):
    forbidden = named_object(1, series=2, StudyInstanceUID="1.2.3.8841907.2")
    holdings = Holdings(forbidden, named_object(1), named_object(1, series=3))
    find = holdings.find

    def found(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        study = asked.QueryRetrieveLevel == "SERIES" and asked.StudyInstanceUID == forbidden.StudyInstanceUID
        series = asked.QueryRetrieveLevel == "IMAGE" and asked.SeriesInstanceUID.endswith(".3")
        yield from [(0xC001, None)] if study or series else find(event)

    holdings.find = found
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
    assert (pulled.images, pulled.failed) == (1, 2)
    assert pulled.why == {"the archive does not answer the search (status C001)": 2}


def test_a_search_that_is_refused_asks_once_and_one_without_resources_ends_it(tmp_path: Path):
    holdings = Holdings(*(named_object(1, series=n, StudyInstanceUID=f"1.2.3.8841907.{n}") for n in range(1, 7)))
    find, asked, status, pseudonyms = holdings.find, list[str](), 0xC001, pseudonyms_in(tmp_path)

    def found(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        series = event.identifier.QueryRetrieveLevel == "SERIES"
        asked.extend([event.identifier.StudyInstanceUID] if series else [])
        yield from [(status, None)] if series else find(event)

    holdings.find = found
    with archive_of(holdings) as address:
        pulled = pull(dimse(address), ANY, tmp_path / "out", pseudonyms, wait_s=0.001)
        assert (pulled.failed, len(asked)) == (6, 6)
        asked.clear()
        status = 0xA700
        with pytest.raises(DataError, match=r"status A700\), at 3 studies in a row"):
            pull(dimse(address), ANY, tmp_path / "out", pseudonyms, wait_s=0.001)
    assert len(asked) == 3 * 5


def test_of_a_list_a_search_that_fails_costs_no_more_than_itself(tmp_path: Path):
    objects = [named_object(n, AccessionNumber=f"A{n}", StudyInstanceUID=f"1.2.3.8841907.{n}") for n in (1, 2, 3)]
    holdings = Holdings(*objects)
    find = holdings.find
    holdings.find = lambda event: [(0xC001, None)] if event.identifier.get("AccessionNumber") == "A2" else find(event)
    with archive_of(holdings) as address:
        listed = Query(accessions=("A1", "A2", "A3"))
        pulled = pull(dimse(address), listed, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
    assert (pulled.images, pulled.listed) == (2, "2 of 3 accessions found (the others: not-found.csv)")
    assert pulled.why == {"the archive does not answer the search (status C001)": 1}


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
