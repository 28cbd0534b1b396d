"""What is asked for: the command, its query, its list, and the site's keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openpyxl
import pytest
from intake_files import NAME, NUMBER, named_object, pseudonyms_in
from loopback_archive import ANY, Holdings, archive_of, dimse, table_in
from pynetdicom import evt
from real_consortium import command

from fedmed.errors import ConfigError, DataError
from fedmed.intake.archive import SERIES, STUDY
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.pull import pull
from fedmed.intake.query import Query, Series, meets, parse_query, questions
from fedmed.privacy.keys import read_keys


def test_a_pull_says_what_came_and_what_to_type_next_and_makes_the_sites_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    holdings = Holdings(
        named_object(1), named_object(2, PatientID="other", AccessionNumber="9", StudyInstanceUID="1.2")
    )
    out, keys = tmp_path / "my images", tmp_path / "my keys"
    table = tmp_path / "list.csv"
    table.write_text(f"note;accession\n{NAME};ACC8841907\n;\n")
    with archive_of(holdings) as address:
        command("data", "pull", "--pacs", address, "--called", "ARCHIVE", "--calling", "FEDMED", "--list", table,
                "--query", "modality=DX,CR", "--keys", keys, "--out", out)  # fmt: skip
    assert capsys.readouterr().out == (
        "1 of 1 accessions found, 1 study, 1 image, 0 quarantined, 0 series failed\n"
        f"next: fedmed data import dicom '{out}' --out DIR --table CSV --keys '{keys}'\n"
    )
    pseudonyms = Pseudonyms(keys=read_keys(keys))
    assert table_in(out)[0]["accession"] == pseudonyms.accession("ACC8841907")


@pytest.mark.parametrize(("column", "known"), [("accession", "ACC8841907"), ("patient", NUMBER)])
def test_what_of_a_list_is_not_in_the_archive_is_counted_and_told_to_the_site_alone(
    tmp_path: Path, column: str, known: str
):
    table, out, pseudonyms = tmp_path / "list.csv", tmp_path / "out", pseudonyms_in(tmp_path)
    table.write_text(f"{column}\n0017\n{known}\n99\n")
    with archive_of(Holdings(named_object(1), named_object(2, series=2))) as address:
        pulled = pull(dimse(address), parse_query("", table), out, pseudonyms)
        assert str(pulled).startswith(
            f"1 of 3 {column}s found (the others: not-found.csv), 1 study, 2 images"
        ) and "0017" not in str(pulled)
        assert (out / "not-found.csv").read_text() == f"{column}\n0017\n99\n"
        assert (out / "not-found.csv").stat().st_mode & 0o077 == 0
        with pytest.raises(DataError, match=f"meets the query .0 of 2 {column}s found .the others: not-found.csv"):
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
        ("date=20241231-20240101", "ends before it begins"),
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
        ("id\n1\n", 'one column "accession" or "patient"; the first line names'),
        ("Accession Number,MRN\n1,2\n", 'there are "Accession Number", "MRN": delete all but one'),
        ("accession\n\n", "is empty"),
        ("patient\nAB*\n", "pattern"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(text: str, reason: str, tmp_path: Path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=reason):
        parse_query("", tmp_path / "list.csv")


def test_a_list_may_be_a_spreadsheet_whose_numbers_are_numbers(tmp_path: Path):
    book = openpyxl.Workbook()
    for cells in (("Name", "Accession"), ("anyone", 1007.0), ("nobody", None), ("anyone", "A 8")):
        book.active.append(cells)
    book.save(tmp_path / "list.xlsx")
    assert parse_query("", tmp_path / "list.xlsx").accessions == ("1007", "A 8")


@pytest.mark.parametrize(
    ("column", "field"),
    [
        ("Accession Number", "accessions"),
        ("AccessionNo", "accessions"),
        ("MRN", "patients"),
        ("Patient_ID", "patients"),
    ],
)
def test_the_column_of_a_list_may_be_called_as_a_ris_calls_it(column: str, field: str, tmp_path: Path):
    (tmp_path / "list.csv").write_text(f"Report date,{column}\n2024-01-31,A8\n")
    assert getattr(parse_query("", tmp_path / "list.csv"), field) == ("A8",)


def test_lists_are_asked_for_one_by_one_and_other_conditions_hold_as_well(tmp_path: Path):
    (tmp_path / "list.csv").write_text("\ufeffPatient\n7\n8\n7\n", encoding="utf-8")
    query = parse_query("modality=DX date=20240131", tmp_path / "list.csv")
    assert questions(query) == [
        {"StudyDate": "20240131", "PatientID": "7"},
        {"StudyDate": "20240131", "PatientID": "8"},
    ]
    series = Series(study="1", series="2", modality="CT", description="")
    assert not meets(query, series)


def test_the_first_line_of_a_list_without_names_is_a_patients_and_is_not_quoted(tmp_path: Path):
    (tmp_path / "list.csv").write_text("MRN-0001,Zebrafinch\nMRN-0002,Kakapo\n")
    with pytest.raises(DataError, match="the first line names the columns") as refused:
        parse_query("", tmp_path / "list.csv")
    assert "MRN" not in str(refused.value) and "Zebrafinch" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "said", "expected"),
    [
        ({"accessions": ("A7",)}, {"accession": "A7"}, True),
        ({"accessions": ("A7",)}, {"accession": "a7"}, True),
        ({"accessions": ("A7",)}, {"accession": "A71"}, False),
        ({"accessions": ("A7",)}, {"accession": ""}, True),
        ({"accessions": ("A7",)}, {}, True),
        ({"patients": ("7", "8")}, {"patient": "8"}, True),
        ({"patients": ("7", "8")}, {"patient": "9"}, False),
        ({"dates": "20240131"}, {"date": "20240131"}, True),
        ({"dates": "20240131"}, {"date": "20240201"}, False),
        ({"dates": "20240101-20241231"}, {"date": "20250101"}, False),
        ({"dates": "20240101-20241231"}, {"date": "20240615"}, True),
        ({"dates": "20240101-"}, {"date": "20231231"}, False),
        ({"dates": "20240101-"}, {"date": "20991231"}, True),
        ({"dates": "-20241231"}, {"date": "19990101"}, True),
        ({"dates": "-20241231"}, {"date": "20250101"}, False),
    ],
)
def test_what_an_archive_does_not_match_is_compared_here(asked, said, expected):
    series = Series(study="1", series="2", modality="DX", description="", **said)
    assert meets(Query(**asked), series) is expected


def test_an_archive_that_takes_no_notice_of_a_list_gives_no_other_patient(tmp_path: Path):
    class Deaf:
        def studies(self, question, patience):
            blank = dict.fromkeys(STUDY, "")
            return (blank | {"StudyInstanceUID": f"1.{number}", "PatientID": str(number)} for number in range(5))

        def series_of(self, study, patience):
            return [dict.fromkeys(SERIES, "") | {"SeriesInstanceUID": f"2.{study}", "Modality": "DX"}]

        def objects(self, series):
            assert series.study == "1.3"
            return []

        def fetch(self, series, take):
            assert series.study == "1.3"

    pulled = pull(Deaf(), Query(patients=("3", "77")), tmp_path / "out", pseudonyms_in(tmp_path))
    assert pulled.listed == "1 of 2 patients found (the others: not-found.csv)" and pulled.failed == 0
    assert (tmp_path / "out" / "not-found.csv").read_text() == "patient\n77\n"


def test_a_series_meets_a_query_by_words_in_any_order_and_by_what_the_archive_does_not_say():
    series = Series(study="1", series="2", modality="DX", description="Thorax  PA  im Stehen")
    assert meets(Query(description="pa thorax", body_part="CHEST", modalities=("DX",)), series)
    assert not meets(Query(description="pa abdomen"), series)
