"""What a DICOMweb service refuses or spoils costs the study, the series or the object that it is of, and no other."""

import re
from pathlib import Path

import pytest
from intake_files import named_object, pseudonyms_in
from loopback_archive import ANY
from loopback_dicomweb import MULTIPART, DicomWebService, dicomweb_of

from fedmed.errors import DataError
from fedmed.intake.dicomweb import DicomWeb
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.pull import Pulled, pull
from fedmed.intake.query import Query

STUDY = "1.2.3.8841907.1"
PAGE = b"<html>the proxy is being mended</html>"


def pulled(service: DicomWebService, out: Path, pseudonyms: Pseudonyms) -> Pulled:
    with dicomweb_of(service) as url:
        return pull(DicomWeb(url), ANY, out, pseudonyms, wait_s=0.001)


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (403, "the archive does not let this user read it (403)"),
        (404, "the archive does not have what it lists (404)"),
        (400, "the archive answers with status 400"),
    ],
)
@pytest.mark.parametrize(
    ("refused", "images"),
    [
        (f"studies/{STUDY}9/series", 4),  # to tell of which series a study is
        (f"studies/{STUDY}9/series/{STUDY}.2/instances", 5),  # of which objects a series is: it came, perhaps in part
        (f"studies/{STUDY}9/series/{STUDY}.2(/instances/.+)?", 4),  # to send them
    ],
)
def test_what_the_archive_refuses_is_counted_as_failed_and_all_else_comes(
    refused: str, images: int, status: int, why: str, tmp_path: Path
):
    objects = [named_object(number, series=series) for series in (1, 3) for number in (1, 2)]
    service = DicomWebService(named_object(1, series=2, StudyInstanceUID=f"{STUDY}9"), *objects)
    service.wrong = lambda path, times: (status, b"") if re.fullmatch(refused, path) else None
    found = pulled(service, tmp_path / "out", pseudonyms_in(tmp_path))
    assert (found.images, found.why) == (images, {why: 1})
    assert sum(re.fullmatch(refused, path) is not None for path in service.asked) <= 2  # to ask again would not help


@pytest.mark.parametrize(
    ("status", "why"),
    [(403, "the archive does not let this user read it (403)"), (404, "the archive does not have what it lists (404)")],
)
def test_of_a_list_what_the_archive_refuses_to_search_for_costs_no_more_than_itself(
    status: int, why: str, tmp_path: Path
):
    service = DicomWebService(named_object(1), named_object(2))
    service.wrong = lambda path, times: (status, b"") if path == "studies" and times in (2, 3) else None
    with dicomweb_of(service) as url:  # the search for the first takes two pages
        listed = Query(accessions=("A1", "A2", "A3", "A4"))
        found = pull(DicomWeb(url), listed, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001)
    assert (found.images, found.why, found.listed) == (
        2,
        {why: 2},
        "2 of 4 accessions found (the others: not-found.csv)",
    )
    assert (tmp_path / "out/not-found.csv").read_text() == "accession\nA2\nA3\n"


@pytest.mark.parametrize(("status", "why"), [(401, "wants a user name"), (403, "does not allow this user to search")])
def test_an_archive_that_refuses_the_first_search_ends_a_list_at_once(status: int, why: str, tmp_path: Path):
    service = DicomWebService(named_object(1))
    service.wrong = lambda path, times: (status, b"")
    with dicomweb_of(service) as url, pytest.raises(DataError, match=why):
        pull(DicomWeb(url), Query(accessions=("A1", "A2")), tmp_path / "out", pseudonyms_in(tmp_path))
    assert len(service.asked) == 1 and not (tmp_path / "out").exists()


def test_a_password_that_expires_in_a_pull_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDMED_PACS_USER", "anna")
    monkeypatch.setenv("FEDMED_PACS_PASSWORD", "hidden-word")
    service = DicomWebService(named_object(1), named_object(1, series=2))
    service.wrong = lambda path, times: (401, b"") if path.endswith(".2") else None
    with pytest.raises(DataError, match="refuses the user name and password"):
        pulled(service, tmp_path / "out", pseudonyms_in(tmp_path))


def test_a_page_in_the_place_of_dicom_is_no_object_and_is_asked_for_again(tmp_path: Path):
    service = DicomWebService(named_object(1), named_object(2))
    service.wrong = lambda path, times: (200, PAGE) if "/series/" in path and times == 0 else None
    found = pulled(service, tmp_path / "out", pseudonyms_in(tmp_path))
    assert (found.images, found.unreadable, found.failed) == (2, 0, 0)


def test_an_object_that_does_not_come_is_no_unreadable_one_and_comes_once_the_fault_has_passed(tmp_path: Path):
    objects, pseudonyms = (named_object(1), named_object(2)), pseudonyms_in(tmp_path)
    service = DicomWebService(*objects)
    service.wrong = lambda path, times: (200, PAGE) if re.fullmatch(rf".*{STUDY}\.1(/instances/.*\.2)?", path) else None
    found = pulled(service, tmp_path / "out", pseudonyms)
    assert (found.images, found.unreadable, found.failed) == (1, 0, 1)
    found = pulled(DicomWebService(*objects), tmp_path / "out", pseudonyms)
    assert (found.images, found.unreadable, found.failed) == (2, 0, 0)


def test_a_search_goes_on_at_the_page_that_was_not_answered_and_says_how_far_it_is(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("fedmed.intake.dicomweb.PAGE", 2)
    service = DicomWebService(*(named_object(1, series=n, StudyInstanceUID=f"{STUDY}{n}") for n in range(1, 6)))
    service.wrong = lambda path, times: (
        (503, b"") if path in ("studies", f"studies/{STUDY}4/series") and times == 2 else None
    )
    found: list[int] = []
    with dicomweb_of(service) as url:
        pull(DicomWeb(url), ANY, tmp_path / "out", pseudonyms_in(tmp_path), wait_s=0.001, searching=found.append)
    assert found == [1, 2, 3, 4, 5]
    assert service.asked.count("studies") == 4 + 1  # three pages, an empty one, and the one without an answer
    assert service.asked.count(f"studies/{STUDY}1/series") == 2


def test_a_search_that_finds_a_page_at_three_studies_in_a_row_ends(tmp_path: Path):
    service = DicomWebService(*(named_object(1, series=n, StudyInstanceUID=f"{STUDY}{n}") for n in range(1, 9)))
    service.wrong = lambda path, times: (200, PAGE) if path.endswith("/series") else None
    with pytest.raises(DataError, match="something that is no DICOM, at 3 studies in a row"):
        pulled(service, tmp_path / "out", pseudonyms_in(tmp_path))
    assert len(service.asked) == 1 + 3 * 5


def test_objects_that_are_no_dicom_are_unreadable_and_every_pull_asks_for_each_once_more(tmp_path: Path):
    service, pseudonyms = [DicomWebService(*map(named_object, (1, 2, 3))) for _ in range(3)], pseudonyms_in(tmp_path)
    noise = b"--part\r\nContent-Type: application/dicom\r\n\r\n" + b"noise" * 99 + b"\r\n--part--"
    torn = rf"studies/.*{STUDY}\.1(/instances/.*\.[23])?"
    for each in service[:2]:
        each.wrong = lambda path, times: (200, noise, MULTIPART) if re.fullmatch(torn, path) else None
    found = pulled(service[0], tmp_path / "out", pseudonyms)
    assert (found.images, found.unreadable, found.failed) == (1, 2, 0)
    assert str(pulled(service[1], tmp_path / "out", pseudonyms)) == str(found)
    alone = [[path for path in each.asked if re.fullmatch(r".*/instances/.*\.[23]", path)] for each in service[:2]]
    assert [len(paths) for paths in alone] == [4, 2]
    found = pulled(service[2], tmp_path / "out", pseudonyms)
    assert (found.images, found.unreadable, found.failed) == (3, 0, 0)
