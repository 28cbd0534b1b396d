"""Tables of labels as hospitals export them: read whole or refused, joined both ways, and never a wrong label."""

import csv
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from import_files import RULES, hospital, missed, picture, rows, spreadsheet, table

from fedmed.errors import ConfigError, DataError
from fedmed.intake.importing import Rules, import_images
from fedmed.intake.labels import guessed_rules, read_label_rules, read_labels
from fedmed.intake.opt_out import opted_out
from fedmed.intake.persons import sex_of, years
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.tables import table_rows
from fedmed.privacy.keys import make_keys


@pytest.fixture(scope="module")
def pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Pseudonyms:
    return Pseudonyms(keys=make_keys(tmp_path_factory.mktemp("site") / "keys"))


def test_a_spreadsheet_is_joined_both_ways_and_what_is_unknown_is_never_zero(tmp_path, pseudonyms):
    source, rules = hospital(tmp_path, pseudonyms)
    report = import_images("pairs", source, tmp_path / "out", rules)
    read = {Path(row["image"]).stem: row for row in rows(tmp_path / "out")}
    assert {stem: row["effusion"] for stem, row in read.items()} == {"0": "1", "1": "0", "2": "", "3": "1"}
    assert read["0"]["patient_id"] == read["1"]["patient_id"] == pseudonyms.patient("17")
    assert (read["0"]["sex"], read["2"]["sex"]) == ("F", "M")
    assert rules.table.strange == {"effusion": 1}
    assert report.unmatched == {"image without row": 1, "row without image": 1}
    assert missed(tmp_path / "out")[1] == ("row without image", "row 7 of the table")


def test_rows_that_contradict_each_other_leave_the_label_unknown(tmp_path, pseudonyms):
    sheet = table(
        tmp_path / "t.csv", "Datei;PatNr;Geschlecht;Erguss;Erguss 2", "1;1;m;pos;", "1;1;m;neg;", "2;1;m;pos;"
    )
    (tmp_path / "labels.toml").write_text(RULES)
    known = read_labels(sheet, read_label_rules(tmp_path / "labels.toml"), pseudonyms)
    for stem in "12":
        picture(tmp_path / "set" / f"{stem}.png")
    import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms, table=known))
    assert [row["effusion"] for row in rows(tmp_path / "out")] == ["", "1"]
    assert known.conflicts == 1
    told = (tmp_path / "out" / "unmatched.csv").read_text().splitlines()
    assert told[1:] == [f"another row says the opposite of effusion,row {number} of the table" for number in (2, 3)]


@pytest.mark.parametrize(
    ("text", "age"), [("89", "89"), ("90", "90"), ("104", "90"), ("093Y", "90"), ("130", ""), ("x", "")]
)
def test_an_age_above_89_of_a_table_is_90_in_the_manifest(text, age):
    assert years(text) == age


@pytest.mark.parametrize("said", [("pos", "neg", "pos"), ("pos", "neg", "neg"), ("pos", "pos", "neg")])
def test_a_further_row_settles_no_contradiction(said, tmp_path, pseudonyms):
    sheet = table(tmp_path / "t.csv", "Datei;PatNr;Geschlecht;Erguss;Erguss 2", *(f"1;1;m;{word};" for word in said))
    (tmp_path / "labels.toml").write_text(RULES)
    known = read_labels(sheet, read_label_rules(tmp_path / "labels.toml"), pseudonyms)
    picture(tmp_path / "set" / "1.png")
    import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms, table=known))
    assert [row["effusion"] for row in rows(tmp_path / "out")] == [""]
    assert known.conflicts == 1


def test_rows_without_a_key_are_listed_and_rows_numbered_as_a_spreadsheet_does(tmp_path, pseudonyms):
    sheet = table(
        tmp_path / "t.csv", "Datei;PatNr;Geschlecht;Erguss;Erguss 2", '1;"1', '";m;pos;', ";2;m;pos;", "", "9;3;m;pos;"
    )
    (tmp_path / "labels.toml").write_text(RULES)
    known = read_labels(sheet, read_label_rules(tmp_path / "labels.toml"), pseudonyms)
    picture(tmp_path / "set" / "1.png")
    import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms, table=known))
    assert missed(tmp_path / "out") == [
        ("row without image", "row 5 of the table"), ("row without a key", "row 3 of the table"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("Datei,PatNr,Geschlecht,Erguss,Erguss 2", "1,1,m,neg,", "2,2,m,leicht, pos,neg"), "row 3 has more cells"),
        (("Datei,PatNr,Geschlecht,Erguss,Erguss 2,Erguss", "1,1,m,neg,,pos"), '2 columns "Erguss"'),
    ],
)
def test_a_table_whose_cells_fit_no_column_is_refused(lines, said, tmp_path, pseudonyms):
    (tmp_path / "labels.toml").write_text(RULES)
    with pytest.raises(DataError, match=said):
        read_labels(table(tmp_path / "t.csv", *lines), read_label_rules(tmp_path / "labels.toml"), pseudonyms)


@pytest.mark.parametrize("said", ["A1", "A1:A1", "A1:B2"])
def test_a_spreadsheet_is_read_whole_whatever_it_says_of_its_size(said, tmp_path):
    whole = spreadsheet(tmp_path / "whole.xlsx", [["patient_id", "b", "c"], *([str(n), n, None] for n in range(3))])
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "t.xlsx", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("sheet1.xml"):
                assert b'<dimension ref="A1:C4"' in content
                content = content.replace(b'<dimension ref="A1:C4"', f'<dimension ref="{said}"'.encode())
            new.writestr(name, content)
    assert list(table_rows(tmp_path / "t.xlsx")) == list(table_rows(whole)) and len(list(table_rows(whole))) == 3


@pytest.mark.parametrize(
    ("text", "sex"),
    [("Mujer", "F"), ("Hombre", "M"), (" weiblich", "F"), ("W", "F"), ("Männlich", "M"), ("missing", ""), ("", "")],
)
def test_sex_is_known_by_whole_words(text, sex):
    assert sex_of(text) == sex


def test_the_guessed_labels_toml_can_be_used_as_it_is(tmp_path, pseudonyms):
    sheet = table(
        tmp_path / "t.csv", "Accession Number,Patient ID,Age,Pleural Effusion,Comment",
        *(f"A{number},{number},{number + 30},{'yes' if number % 2 else 'no'},text {number}" for number in range(20)),
    )  # fmt: skip
    (tmp_path / "labels.toml").write_text(guessed_rules(sheet))
    rules = read_label_rules(tmp_path / "labels.toml")
    assert (rules.join, rules.column, rules.columns) == ("accession", "Accession Number", {"age": "Age"})
    assert {name: label.columns for name, label in rules.labels.items()} == {"pleural-effusion": ("Pleural Effusion",)}
    assert (rules.labels["pleural-effusion"].positive, rules.labels["pleural-effusion"].negative) == (("yes",), ("no",))
    assert len(read_labels(sheet, rules, pseudonyms)) == 20


def test_columns_of_a_ris_export_are_known_by_its_names_for_them(tmp_path):
    lines = (
        ["AccessionNo", "MRN", "Patient Age", "Gender", "Nodule"],
        ["A1", "17", 61, "F", 1],
        ["A2", "18", 40, "M", 0],
    )
    (tmp_path / "labels.toml").write_text(text := guessed_rules(spreadsheet(tmp_path / "ris.xlsx", list(lines))))
    rules = read_label_rules(tmp_path / "labels.toml")
    assert (rules.join, rules.column, list(rules.labels)) == ("accession", "AccessionNo", ["nodule"])
    assert rules.columns == {"age": "Patient Age", "sex": "Gender"}
    assert '\n# patient_id = "MRN"\n' in text, "the image's header says whose it is, unless somebody decides otherwise"


def test_a_guess_without_labels_says_how_one_is_described(tmp_path):
    text = guessed_rules(table(tmp_path / "t.csv", "Accession Number,Report", "A1,some text", "A2,other text"))
    assert text.splitlines()[-1] == '# Columns that are not used: "Report"'
    told, _, described = text.partition("# No column of yes and no was found.")
    assert described and "[labels" not in told
    (tmp_path / "labels.toml").write_text(
        text.replace("# [labels", "[labels")
        .replace("# columns", "columns")
        .replace("# positive", "positive")
        .replace("# negative", "negative")
    )
    assert read_label_rules(tmp_path / "labels.toml").labels["effusion"].positive == ("pos",)


@pytest.mark.parametrize(
    ("header", "by_name", "guess"),
    [
        ("Study Date,Patient Name,Patient ID", False, ("patient", "Patient ID")),
        ("Accession Date,Accession Number", False, ("accession", "Accession Number")),
        ("Patient ID,Accession-Number (RIS)", False, ("accession", "Accession-Number (RIS)")),
        ("Study (text),StudyInstanceUID", False, ("study", "StudyInstanceUID")),
        ("Patient ID,File name (png)", True, ("image", "File name (png)")),
    ],
)
def test_a_column_of_the_very_name_is_guessed_before_one_that_begins_so(tmp_path, header, by_name, guess):
    sheet = table(tmp_path / "t.csv", header, ",".join("1" * (header.count(",") + 1)))
    (tmp_path / "labels.toml").write_text(guessed_rules(sheet, by_name=by_name) + "[labels]\n")
    rules = read_label_rules(tmp_path / "labels.toml")
    assert (rules.join, rules.column) == guess


def test_a_title_above_the_names_of_columns_is_asked_after(tmp_path):
    with pytest.raises(DataError, match=r"row 2 has more cells .* is there a title above the names"):
        guessed_rules(table(tmp_path / "t.csv", "Export", "Accession,Effusion", "A1,yes"))


def test_where_no_column_looks_like_a_key_none_is_taken(tmp_path):
    """The first one may be a name, by which nobody is to be joined."""
    sheet = table(tmp_path / "t.csv", "Name,Effusion", "Zebrafinch,yes", "Kakapo,no")
    (tmp_path / "labels.toml").write_text(guessed_rules(sheet))
    with pytest.raises(ConfigError, match="column: name the column of the table"):
        read_label_rules(tmp_path / "labels.toml")


def test_a_guess_for_pictures_goes_by_their_names_and_takes_no_strange_split(tmp_path):
    sheet = table(
        tmp_path / "t.csv", "patient_id,path,split,sex,Nodule", "p1,a/1.png,dev,F,1.0", "p2,a/2.png,dev,M,0.0"
    )
    (tmp_path / "labels.toml").write_text(guessed_rules(sheet, by_name=True))
    rules = read_label_rules(tmp_path / "labels.toml")
    assert (rules.join, rules.column) == ("image", "path")
    assert rules.columns == {"sex": "sex", "patient_id": "patient_id"}
    assert rules.labels["nodule"].positive == ("1.0",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('positive = ["pos"]', 'positive = ["pos", "NEG"]'), "is positive and negative"),
        (('join = "image"', 'join = "name"'), "join"),
        (('sex = "Geschlecht"', 'gender = "Geschlecht"'), "columns.gender"),
        (("[labels.effusion]", "[labels.effusion"), "not valid TOML"),
    ],
)
def test_a_wrong_labels_toml_is_refused(tmp_path, change, said):
    (tmp_path / "labels.toml").write_text(RULES.replace(*change))
    with pytest.raises(ConfigError, match=said):
        read_label_rules(tmp_path / "labels.toml")


def test_a_column_that_the_table_lacks_is_named(tmp_path, pseudonyms):
    (tmp_path / "labels.toml").write_text(RULES)
    sheet = table(tmp_path / "t.csv", "Datei,PatNr,Geschlecht,Erguss", "1,1,m,pos")
    with pytest.raises(DataError, match='no column "Erguss 2"'):
        read_labels(sheet, read_label_rules(tmp_path / "labels.toml"), pseudonyms)


CELLS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12).map(str.strip)


@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8), separator=st.sampled_from(",;\t"))
def test_a_table_reads_back_what_was_written(tmp_path_factory, cells, separator):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("first", "second"), *cells])
    read = [(row["first"], row["second"]) for _, row in table_rows(path)]
    assert read == [pair for pair in cells if any(pair)]


def test_excel_and_csv_of_one_table_are_equal(tmp_path):
    lines = [["id", "age", "when"], [1.0, 61.5, "2020-01-02"], ["007", None, "x"]]
    sheet = spreadsheet(tmp_path / "t.xlsx", lines)
    plain = table(tmp_path / "t.csv", "id,age,when", "1,61.5,2020-01-02", "007,,x")
    assert list(table_rows(sheet)) == list(table_rows(plain))


@pytest.mark.parametrize("before", [(), ("sep=;",)])
def test_a_csv_of_a_windows_machine_is_joined_by_file_name(before, tmp_path, pseudonyms):
    lines = ("Datei;PatNr;Geschlecht;Erguss;Erguss 2", "D:\\Bilder\\0.png;1;m;pos;", "1.png;1;m;neg;")
    (tmp_path / "labels.toml").write_text(RULES)
    known = read_labels(
        table(tmp_path / "t.csv", *before, *lines), read_label_rules(tmp_path / "labels.toml"), pseudonyms
    )
    for stem in "01":
        picture(tmp_path / "set" / f"{stem}.png")
    import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms, table=known))
    assert [row["effusion"] for row in rows(tmp_path / "out")] == ["1", "0"]
    assert list(table_rows(tmp_path / "t.csv"))[1][0] == 3


@pytest.mark.parametrize(
    ("part", "change"), [("xl/styles.xml", "cellXfs"), ("xl/worksheets/sheet1.xml", "</sheetData>")]
)
def test_a_spreadsheet_that_openpyxl_cannot_parse_is_refused_in_one_line(part, change, tmp_path):
    whole = spreadsheet(tmp_path / "whole.xlsx", [["a", "b"], ["1", "2"], ["3", "4"]])
    with zipfile.ZipFile(whole) as book, zipfile.ZipFile(tmp_path / "other.xlsx", "w") as other:
        for name in book.namelist():
            content = book.read(name).decode()
            other.writestr(name, content.replace(change, "broken", 1) if name == part else content)
    with pytest.raises(DataError, match=r"^other\.xlsx: .*save it anew in a spreadsheet, or as CSV UTF-8$"):
        list(table_rows(tmp_path / "other.xlsx"))


@pytest.mark.parametrize("header", ["patient_id", "patient_id,why"])
def test_a_note_beside_a_patient_who_withdrew_stops_nothing_and_hides_nobody(tmp_path, pseudonyms, header):
    path = table(tmp_path / "t.csv", header, "4711,asked by phone", "4712")
    assert {"4711", "4712"} <= opted_out(path, pseudonyms)
    other = table(tmp_path / "semicolon.csv", "patient_id", "4713;by letter", "4714\tby phone")
    assert {"4713", pseudonyms.patient("4713"), "4714"} <= opted_out(other, pseudonyms)
    for line in ("a,4713,b", ",4713,b") if "," in header else (",4713",):  # which cell is the patient's?
        with pytest.raises(DataError, match=r"row 2 has more cells"):
            opted_out(table(tmp_path / "t.csv", header, line), pseudonyms)


@pytest.mark.parametrize(
    ("name", "content"), [("a.xlsx", b"no zip"), ("a.csv", b"\xff\xfe\x00"), ("a.csv", b""), ("b.csv.gz", b"x")]
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name) as raised:
        list(table_rows(tmp_path / name))
    assert "\n" not in str(raised.value)
