"""DICOM archives: de-identified once, gone on with after a kill, joined with a sheet of accession numbers."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import cells_of, image_object, picture, written
from image_sets import REAL
from phantom_series import Acquisition, phantom_body, slice_objects
from pydicom.uid import SecondaryCaptureImageStorage

from fedmed.cli.intake import import_data
from fedmed.errors import DataError
from fedmed.imaging.volumes import read_volume
from fedmed.intake.importing import Imported, Rules, import_images
from fedmed.intake.journal import COLUMNS, TABLE, write_table
from fedmed.intake.keep import keep
from fedmed.intake.kinds import KINDS
from fedmed.intake.kinds.dicom import TAKEN, take_in
from fedmed.intake.kinds.found import Found
from fedmed.intake.labels import LabelRules, LabelTable, read_labels
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import make_keys, read_keys

SHEET = LabelRules.model_validate(
    {
        "join": "accession", "column": "Accession", "columns": {"age": "Age"},
        "labels": {"effusion": {"columns": ("Effusion",), "positive": ("pos",), "negative": ("neg",)}},
    }
)  # fmt: skip


@pytest.fixture
def pseudonyms(tmp_path: Path) -> Pseudonyms:
    return Pseudonyms(keys=make_keys(tmp_path / "keys"))


def archive(folder: Path, count: int = 6) -> Path:
    """Radiographs of patients who have two each, in a tree whose names are names."""
    for number in range(count):
        name = f"Doe-{number // 2}"
        ds = image_object(
            np.roll(cells_of(picture()), 7 * number, axis=1), PatientID=f"MRN {number // 2}", PatientName=name,
            AccessionNumber=f"ACC{number}", SOPInstanceUID=f"1.2.3.{number + 1}", Modality="DX", ViewPosition="PA",
            StudyInstanceUID=f"1.2.4.{number + 1}", SeriesInstanceUID=f"1.2.5.{number + 1}", PatientSex="F",
        )  # fmt: skip
        (folder / name).mkdir(parents=True, exist_ok=True)
        written(ds, folder / name / f"{name}-{number}.dcm")
    (folder / "note.txt").write_text("Doe")
    return folder


def sheet(path: Path, pseudonyms: Pseudonyms, numbers: range) -> LabelTable:
    lines = [f"acc{number},{40 + number},{'pos' if number % 2 else 'neg'}" for number in numbers]
    path.write_text("\n".join(["Accession,Age,Effusion", *lines]) + "\n")
    return read_labels(path, SHEET, pseudonyms)


def manifest(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def imported(source: Path, out: Path, pseudonyms: Pseudonyms, table: LabelTable | None = None) -> Imported:
    take_in(source, out, pseudonyms)
    return import_images("dicom", out, out, Rules(pseudonyms=pseudonyms, table=table))


def test_a_tree_is_joined_with_a_sheet_of_accession_numbers_and_names_nobody(tmp_path, pseudonyms):
    table, out = sheet(tmp_path / "labels.csv", pseudonyms, range(1, 8)), tmp_path / "out"
    report = imported(archive(tmp_path / "export"), out, pseudonyms, table)
    rows = manifest(out)
    assert len(rows) == 5 and {row["patient_id"] for row in rows} == {pseudonyms.patient(f"MRN {n}") for n in range(3)}
    assert sorted((row["age"], row["effusion"]) for row in rows) == [
        ("41", "1"), ("42", "0"), ("43", "1"), ("44", "0"), ("45", "1"),
    ]  # fmt: skip
    assert {(row["view"], row["sex"]) for row in rows} == {("PA", "F")}
    assert report.unmatched == {"image without row": 1, "row without image": 2, "not DICOM": 1}
    for file in (path for path in out.rglob("*") if path.is_file()):
        content = file.read_bytes() + str(file.relative_to(out)).encode()
        told = rb"Doe|MRN |ACC1|(?<![0-9a-f])acc1(?![0-9a-f])|1\.2\.3\."  # a digest may hold acc1 by chance
        assert not re.search(told, content)
        assert file.stat().st_mode & 0o077 == 0


def test_a_key_that_rows_give_to_two_patients_joins_no_image_and_another_number_in_the_header_is_told(
    tmp_path, pseudonyms, capsys
):
    lines = [
        "ACC0,MRN 0,pos",
        "ACC1, mrn 0,pos",
        "ACC1,MRN 0,",
        "ACC2,MRN 7,neg",
        "ACC3,MRN 1,pos",
        "ACC3,X 1,",
        "ACC4,,neg",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["Accession,Patient,Effusion", *lines]) + "\n")
    (tmp_path / "labels.toml").write_text(
        'join = "accession"\ncolumn = "Accession"\n[columns]\npatient_id = "Patient"\n'
        '[labels.effusion]\ncolumns = ["Effusion"]\npositive = ["pos"]\nnegative = ["neg"]\n'
    )
    out = tmp_path / "out"
    import_data(
        "dicom", archive(tmp_path / "export", 5), out, pseudonyms,
        table=tmp_path / "labels.csv", labels=tmp_path / "labels.toml", opt_out=None, uncertain="ignore",
    )  # fmt: skip
    assert [(row["patient_id"], row["effusion"]) for row in manifest(out)] == [
        (pseudonyms.patient(patient), label)
        for patient, label in (("MRN 0", "1"), ("MRN 0", "1"), ("MRN 7", "0"), ("MRN 2", "0"))
    ]
    assert "1 image of which the row of the table names another patient" in capsys.readouterr().err
    with (out / "unmatched.csv").open(newline="") as file:
        found = [(row["what"], row["where"]) for row in csv.DictReader(file) if row["what"] != "not DICOM"]
    what = "row whose key another row gives to another patient"
    assert found[0][0] == "image whose rows in the table name several patients"
    assert found[1:] == [(what, "row 6 of the table"), (what, "row 7 of the table")]


KILLED = """
import os, signal, sys
from pathlib import Path
from fedmed.intake.kinds.dicom import take_in
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import read_keys

def at_three(done, of):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

source, out, keys = map(Path, sys.argv[1:])
take_in(source, out, Pseudonyms(keys=read_keys(keys)), at_three)
"""


def test_an_import_that_was_killed_goes_on_and_does_nothing_twice(tmp_path, pseudonyms):
    source, out = archive(tmp_path / "export"), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, source, out, tmp_path / "keys"], check=False)
    assert done.returncode == -9
    before = {path: path.stat().st_ino for path in (out / "images").rglob("*.dcm")}
    assert len(before) == 3
    with (out / TAKEN).open("a") as file:
        file.write("PHALF,2.25")  # a line that the kill cut off
    report = imported(source, out, Pseudonyms(keys=read_keys(tmp_path / "keys")))
    assert {path: path.stat().st_ino for path in before} == before
    assert report.images == 6 and report.unmatched == {"not DICOM": 1}
    assert len(list((out / "images").rglob("*.dcm"))) == 6


def test_what_is_in_quarantine_waits_for_a_person_and_counts_once_it_was_moved(tmp_path, pseudonyms):
    source, out = archive(tmp_path / "export", 2), tmp_path / "out"
    shown = image_object(
        cells_of(picture()), PatientID="MRN 0", AccessionNumber="ACC9", BurnedInAnnotation="YES", Modality="DX",
        SOPInstanceUID="1.2.3.9", SeriesInstanceUID="1.2.5.9", StudyInstanceUID="1.2.4.9",
    )  # fmt: skip
    written(shown, source / "burned.dcm")
    table = sheet(tmp_path / "labels.csv", pseudonyms, range(10))
    report = imported(source, out, pseudonyms, table)
    assert report.images == 2 and report.unmatched["in quarantine: burned-in annotation, says its header"] == 1
    assert report.unmatched["row without image"] == 7  # of 0 to 9; that of ACC9 has one, which waits for a person
    with (out / "quarantine.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    (out / line["image"]).parent.mkdir(parents=True)
    (out / line["file"]).rename(out / line["image"])
    assert imported(source, out, pseudonyms, sheet(tmp_path / "labels.csv", pseudonyms, range(10))).images == 3


def series(folder: Path) -> Path:
    acquisition = Acquisition(shape=(5, 24, 20))
    folder.mkdir(parents=True)
    for number, ds in enumerate(slice_objects(phantom_body(acquisition.shape)[0], acquisition)):
        ds.PatientID, ds.AccessionNumber, ds.BodyPartExamined = "MRN 5", "ACC1", "CHEST"
        ds.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def test_slices_become_one_row_and_a_series_without_all_its_slices_none(tmp_path, pseudonyms):
    source, out = series(tmp_path / "export"), tmp_path / "out"
    imported(source, out, pseudonyms, sheet(tmp_path / "labels.csv", pseudonyms, range(2)))
    (row,) = manifest(out)
    assert np.array_equal(read_volume(out / row["image"]).values, read_volume(source).values)
    image = next((out / "images").rglob("*.dcm"))
    image.rename(out / "apart.dcm")
    (out / "quarantine.csv").write_text(f"file,image,reason\napart.dcm,{image.relative_to(out)},burned-in text\n")
    rules = Rules(pseudonyms=pseudonyms, table=sheet(tmp_path / "l.csv", pseudonyms, range(2)))
    with pytest.raises(DataError, match="nothing of"):
        import_images("dicom", out, out, rules)


@pytest.mark.parametrize(
    ("tags", "images"), [({"SOPClassUID": SecondaryCaptureImageStorage}, 1), ({"BurnedInAnnotation": "YES"}, 0)]
)
def test_a_capture_that_a_person_deleted_was_no_slice_of_its_series(tags, images, tmp_path, pseudonyms):
    source, out = series(tmp_path / "export"), tmp_path / "out"
    shown = pydicom.dcmread(source / "4.dcm")
    shown.SOPInstanceUID = "1.2.3.99"
    for keyword, value in tags.items():
        setattr(shown, keyword, value)
    written(shown, source / "shown.dcm")
    take_in(source, out, pseudonyms)
    assert not [each for each in KINDS["dicom"](out) if isinstance(each, Found)]  # it waits for a person
    (apart,) = (out / "quarantine").iterdir()
    apart.unlink()
    assert len([each for each in KINDS["dicom"](out) if isinstance(each, Found)]) == images


def test_what_a_pull_set_apart_is_counted_as_in_quarantine_and_its_row_has_an_image(tmp_path, pseudonyms):
    folder = tmp_path / "pulled"
    for name in ("images/PA/2.25.1/2.25.2.dcm", "quarantine/2.25.3.dcm"):
        (folder / name).parent.mkdir(parents=True)
        written(image_object(cells_of(picture())), folder / name)
    lines = [
        {
            "object": str(number), "image": f"images/PA/2.25.1/2.25.{number}.dcm", "reason": reason,
            "set_apart": bool(reason), "patient_id": "PA", "study_uid": "2.25.0", "series_uid": "2.25.1", "view": "",
            "age": "", "sex": "", "accession": pseudonyms.accession(f"ACC{number}"), "modality": "DX",
        }
        for number, reason in ((2, ""), (3, "burned-in text"), (4, "burned-in text"))
    ]  # fmt: skip
    (folder / ".journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_table(folder)
    rules = Rules(pseudonyms=pseudonyms, table=sheet(tmp_path / "l.csv", pseudonyms, range(2, 5)))
    report = import_images("dicom", folder, tmp_path / "out", rules)
    assert report.images == 1  # ACC4's was deleted
    assert report.unmatched == {"in quarantine: burned-in text": 1, "row without image": 1}
    (folder / "quarantine/2.25.3.dcm").rename(folder / "images/PA/2.25.1/2.25.3.dcm")
    for _ in range(2):
        rules = replace(rules, table=sheet(tmp_path / "l.csv", pseudonyms, range(2, 5)))
        report = import_images("dicom", folder, tmp_path / "out", rules)
        assert (report.images, report.unmatched) == (2, {"row without image": 1}), "released: no pull is needed"
        write_table(folder)  # as the next pull does


def test_a_pulled_folder_is_taken_as_it_is(tmp_path, pseudonyms):
    folder = tmp_path / "pulled"
    image = "images/PA/2.25.1/2.25.2.dcm"
    (folder / image).parent.mkdir(parents=True)
    written(image_object(cells_of(picture())), folder / image)
    facts = ("PA", "2.25.0", "2.25.1", image, "AP", "61", "M", pseudonyms.accession("ACC1"), "DX")
    (folder / TABLE).write_text(f"{','.join(COLUMNS)}\n{','.join(facts)}\n")
    rules = Rules(pseudonyms=pseudonyms, table=sheet(tmp_path / "l.csv", pseudonyms, range(2)))
    import_images("dicom", folder, tmp_path / "out", rules)
    (row,) = manifest(tmp_path / "out")
    assert (row["patient_id"], row["view"], row["effusion"], row["study_uid"]) == ("PA", "AP", "1", "2.25.0")
    assert row["image"] == os.path.join("..", "pulled", image)  # noqa: PTH118


def pulled(folder: Path, pseudonyms: Pseudonyms, *, done: bool = True, unreadable: bool = False) -> Path:
    """What a pull of a CT of five slices leaves, or one that a kill ended."""
    lines = []
    for path in sorted(series(folder / "archive").iterdir()):
        facts = asdict(keep(path, folder / "out", pseudonyms))
        del facts["path"]
        lines.append({"series": facts["series_uid"], "object": Path(facts["image"]).stem, **facts})
    key = lines[0]["series"]
    lines += [{"series": key, "object": "2.25.9", "unreadable": True}] * unreadable + [{"done": key}] * done
    (folder / "out" / ".journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_table(folder / "out")
    return folder / "out"


SETTINGS = {"table": None, "labels": None, "opt_out": None, "uncertain": "ignore"}


@pytest.mark.parametrize(("done", "unreadable", "images"), [(True, False, 1), (False, False, 0), (True, True, 0)])
def test_half_a_pulled_series_is_no_volume(done, unreadable, images, tmp_path, pseudonyms):
    folder = pulled(tmp_path, pseudonyms, done=done, unreadable=unreadable)
    found = list(KINDS["dicom"](folder))
    assert [isinstance(each, Found) for each in found].count(True) == images
    assert images or {each.what for each in found} == {"slice of a series of which another slice is missing"}


def test_a_series_with_a_slice_that_cannot_be_read_is_no_volume(tmp_path, pseudonyms):
    source = series(tmp_path / "export")
    content = (source / "4.dcm").read_bytes()
    (source / "4.dcm").write_bytes(content[: len(content) // 2])  # at the end, where no gap shows
    (source / "5.dcm").symlink_to(tmp_path / "nowhere" / "MRN 5.dcm")
    with pytest.raises(DataError, match="4 × slice of a series"):
        imported(source, tmp_path / "out", pseudonyms)
    with (tmp_path / "out" / "unmatched.csv").open(newline="") as file:
        assert "unreadable: No such file or directory" in {row["what"] for row in csv.DictReader(file)}
    (source / "4.dcm").write_bytes(content)  # copied again
    assert imported(source, tmp_path / "out", pseudonyms).images == 1


def test_what_fedmed_deidentified_is_never_deidentified_again(tmp_path, pseudonyms):
    folder = pulled(tmp_path, pseudonyms)
    import_data("dicom", folder, tmp_path / "again", pseudonyms, **SETTINGS)
    (folder / TABLE).unlink()  # as a kill leaves a first pull
    with pytest.raises(DataError, match="give the same fedmed data pull again"):
        import_data("dicom", folder, tmp_path / "third", pseudonyms, **SETTINGS)
    assert not list(tmp_path.glob("third/images"))
    import_data("dicom", tmp_path / "archive", tmp_path / "taken", pseudonyms, **SETTINGS)
    import_data("dicom", tmp_path / "taken", tmp_path / "fourth", pseudonyms, **SETTINGS)
    for out in ("again", "taken", "fourth"):
        assert {row["patient_id"] for row in manifest(tmp_path / out)} == {pseudonyms.patient("MRN 5")}
    (tmp_path / "taken" / "opt-out.csv").write_text(f"patient_id\n{pseudonyms.patient('MRN 5')}\n")
    with pytest.raises(DataError, match="nothing of"):  # who withdrew there comes back nowhere
        import_data("dicom", tmp_path / "taken", tmp_path / "sixth", pseudonyms, **SETTINGS)
    with pytest.raises(DataError, match="5 × de-identified by fedmed before"):
        imported(folder / "images", tmp_path / "fifth", pseudonyms)


def test_a_list_that_lies_in_the_pulled_folder_can_be_named(tmp_path, pseudonyms):
    folder = pulled(tmp_path, pseudonyms)
    (folder / "opt-out.csv").write_text("patient_id\nMRN 6\n")
    with pytest.raises(DataError, match="--opt-out"):
        import_data("dicom", folder, tmp_path / "in", pseudonyms, **SETTINGS)
    import_data("dicom", folder, tmp_path / "in", pseudonyms, **SETTINGS | {"opt_out": folder / "opt-out.csv"})
    assert len(manifest(tmp_path / "in")) == 1


def test_who_withdrew_is_here_though_nothing_of_them_would_be_imported(tmp_path, pseudonyms, capsys):
    folder, listed = pulled(tmp_path, pseudonyms, done=False), tmp_path / "withdrawn.csv"  # half a series
    listed.write_text("patient_id\nMRN 5\n")
    with pytest.raises(DataError, match="nothing of"):
        import_data("dicom", folder, tmp_path / "in", pseudonyms, **SETTINGS | {"opt_out": listed})
    assert "no image of this patient" not in (tmp_path / "in" / "unmatched.csv").read_text()


def test_half_an_import_is_no_archive_and_a_table_of_the_hospital_is_not_ours(tmp_path, pseudonyms):
    source, out = archive(tmp_path / "export"), tmp_path / "out"
    (source / TAKEN).write_text("accession,imported\n1,yes\n")
    with pytest.raises(KeyboardInterrupt):
        take_in(source, out, pseudonyms, lambda done, _: stop() if done == 3 else None)
    with pytest.raises(DataError, match="give the same fedmed data import again"):
        import_data("dicom", out, tmp_path / "second", pseudonyms, **SETTINGS)
    import_data("dicom", source, out, pseudonyms, **SETTINGS)
    import_data("dicom", out, tmp_path / "second", pseudonyms, **SETTINGS)
    assert len(manifest(tmp_path / "second")) == 6


def stop() -> None:
    raise KeyboardInterrupt


def test_of_patients_who_withdrew_nothing_is_written(tmp_path, pseudonyms, capsys):
    listed, out = tmp_path / "withdrawn.csv", tmp_path / "out"
    listed.write_text("patient_id\nmrn 1\n")
    labels = {"table": tmp_path / "labels.csv", "labels": tmp_path / "labels.toml"}
    sheet(labels["table"], pseudonyms, range(6))
    labels["labels"].write_text(
        'join = "accession"\ncolumn = "Accession"\n[labels.effusion]\ncolumns = ["Effusion"]\n'
        'positive = ["pos"]\nnegative = ["neg"]\n'
    )
    source = archive(tmp_path / "export")
    import_data("dicom", source, out, pseudonyms, **SETTINGS | labels | {"opt_out": listed})
    assert len(list(out.rglob("*.dcm"))) == 4 and "left out: 1 patient who withdrew" in capsys.readouterr().err
    assert not any(
        pseudonyms.patient("MRN 1").encode() in str(path).encode() + path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "opt-out.csv"
    )
    (out / "opt-out.csv").unlink()  # taken back
    import_data("dicom", source, out, pseudonyms, **SETTINGS | labels)
    assert len(list(out.rglob("*.dcm"))) == 6


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")
def test_real_series_are_kept_one_row_a_series(tmp_path, pseudonyms):
    source = REAL / "dicom" / "dev" / "series" / "ct_philips_phantom_std"
    out = tmp_path / "out"
    report = imported(source, out, pseudonyms)
    assert report.images == report.unmatched["a directory of files, not an image"] == 1
    (folder,) = {path.parent for path in (out / "images").rglob("*.dcm")}
    assert np.array_equal(read_volume(folder).values, read_volume(source).values)
