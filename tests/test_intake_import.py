"""Importing: every kind of archive ends in a manifest that can be trained on, and nobody's own number is in it."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_sets import REAL
from import_files import hospital, missed, picture, rows, table
from real_consortium import command

from fedmed.cli.intake import import_data
from fedmed.config import TaskConfig
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.volumes.nifti import write_nifti
from fedmed.imaging.volumes.volume import Volume
from fedmed.intake.importing import SEVERAL, Rules, import_images
from fedmed.intake.kinds import KINDS
from fedmed.intake.kinds.nih import LABELS as NIH_LABELS
from fedmed.intake.labels import LabelRules, read_labels
from fedmed.intake.opt_out import opted_out, remember, remembered
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import make_keys


@pytest.fixture(scope="module")
def pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Pseudonyms:
    return Pseudonyms(keys=make_keys(tmp_path_factory.mktemp("site") / "keys"))


# ---------------------------------------------------------------------------------------------------------- the kinds


NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def test_nih_has_fourteen_labels_and_the_official_split_and_says_what_is_missing(tmp_path, pseudonyms):
    source = tmp_path / "nih"
    table(
        source / "Data_Entry_2017.csv", NIH,
        "00000001_000.png,Cardiomegaly|Effusion,0,1,058Y,M,PA,2682,2749,0.143,0.143,",
        "00000001_001.png,No Finding,1,1,58,M,AP,2682,2749,0.143,0.143,",
        "00000002_000.png,Hernia,0,2,414,F,PA,2682,2749,0.143,0.143,",
    )  # fmt: skip
    table(source / "train_val_list.txt", "00000001_000.png", "00000001_001.png")
    table(source / "test_list.txt", "00000002_000.png")
    for name in ("images_001/images/00000001_000.png", "images_001/images/00000001_001.png", "more/extra.png"):
        picture(source / name)
    report = import_images("nih", source, tmp_path / "out", Rules(pseudonyms=pseudonyms))
    first, second = rows(tmp_path / "out")
    assert len(report.patients) == 1 and report.images == 2
    assert first["patient_id"] == second["patient_id"] == pseudonyms.patient("1")
    assert [name for name in NIH_LABELS if first[name] == "1"] == ["Cardiomegaly", "Effusion"]
    assert all(second[name] == "0" for name in NIH_LABELS)
    assert (first["age"], first["sex"], first["view"], first["split"]) == ("58", "M", "PA", "train")
    assert missed(tmp_path / "out") == [("row without image", "row 4"), ("image without row", "more/extra.png")]
    assert len(read_manifest(tmp_path / "out" / "manifest.csv", TaskConfig(labels=NIH_LABELS)).rows) == 2


def test_a_blank_finding_of_nih_is_unknown_and_a_strange_one_refused(tmp_path, pseudonyms):
    line = "00000001_000.png,{},0,1,058Y,M,PA,2682,2749,0.143,0.143,"
    picture(tmp_path / "nih" / "00000001_000.png")
    table(tmp_path / "nih" / "Data_Entry_2017.csv", NIH, line.format(""))
    import_images("nih", tmp_path / "nih", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    assert {rows(tmp_path / "out")[0][name] for name in NIH_LABELS} == {""}
    table(tmp_path / "nih" / "Data_Entry_2017.csv", NIH, line.format("Oedema"))
    with pytest.raises(DataError, match="row 2 has a finding that is none of NIH's"):
        import_images("nih", tmp_path / "nih", tmp_path / "out", Rules(pseudonyms=pseudonyms))


CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema"


@pytest.mark.parametrize(("uncertain", "edema"), [("ignore", ""), ("zeros", "0"), ("ones", "1")])
def test_chexpert_masks_what_is_blank_and_treats_uncertain_as_asked(tmp_path, pseudonyms, uncertain, edema):
    source = tmp_path / "CheXpert"
    table(
        source / "train.csv", CHEXPERT,
        "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,-1.0",
        "CheXpert-v1.0/train/patient00001/study2/view1_lateral.jpg,Female,68,Lateral,,,0.0",
    )  # fmt: skip
    table(
        source / "valid.csv",
        CHEXPERT,
        "CheXpert-v1.0/valid/patient00002/study1/view1_frontal.jpg,Male,60,Frontal,PA,,1.0",
    )
    for name in ("train/patient00001/study1/view1_frontal.jpg", "train/patient00001/study2/view1_lateral.jpg"):
        picture(source / name)
    picture(source / "valid/patient00002/study1/view1_frontal.jpg")
    import_images("chexpert", source, tmp_path / "out", Rules(pseudonyms=pseudonyms, uncertain=uncertain))
    first, second, third = rows(tmp_path / "out")
    assert (first["No Finding"], first["Edema"], first["split"]) == ("1", edema, "train")
    assert (second["No Finding"], second["Edema"], second["view"]) == ("", "0", "LATERAL")
    assert (third["patient_id"], third["split"]) == (pseudonyms.patient("patient00002"), "validation")


def test_the_batches_of_the_full_chexpert_are_one_set(tmp_path, pseudonyms):
    first, second = (tmp_path / "in" / f"CheXpert-v1.0 batch {name}" for name in ("1 (validate & csv)", "2 (train 1)"))
    shown = ("patient64541/study1/view1_frontal.jpg", "patient00001/study1/view1_frontal.jpg")
    for name, path in zip(("valid", "train"), shown, strict=True):
        table(first / f"{name}.csv", CHEXPERT, f"CheXpert-v1.0/{name}/{path},Female,68,Frontal,AP,1.0,0.0")
    picture(first / "valid" / shown[0])
    picture(second / shown[1])
    import_images("chexpert", tmp_path / "in", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    assert [row["split"] for row in rows(tmp_path / "out")] == ["train", "validation"]
    assert missed(tmp_path / "out") == []


def test_mimic_joins_three_tables_by_study(tmp_path, pseudonyms):
    source = tmp_path / "mimic"
    table(
        source / "mimic-cxr-2.0.0-chexpert.csv.gz",
        "subject_id,study_id,Edema,Fracture",
        "10000032,50414267,-1.0,",
        "10000033,5,1.0,0.0",
    )
    table(
        source / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,subject_id,study_id,ViewPosition",
        "aaa,10000032,50414267,PA", "bbb,10000033,5,AP", "ccc,10000034,6,AP",
    )  # fmt: skip
    table(
        source / "mimic-cxr-2.0.0-split.csv", "dicom_id,study_id,subject_id,split",
        "aaa,50414267,10000032,train", "bbb,5,10000033,validate", "ccc,6,10000034,test",
    )  # fmt: skip
    picture(source / "files/p10/p10000032/s50414267/aaa.jpg")
    picture(source / "files/p10/p10000034/s6/ccc.jpg")
    import_images("mimic-cxr", source, tmp_path / "out", Rules(pseudonyms=pseudonyms))
    (row,) = rows(tmp_path / "out")
    assert (row["Edema"], row["Fracture"], row["split"], row["view"]) == ("", "", "train", "PA")
    assert [what for what, _ in missed(tmp_path / "out")] == ["row without image", "image without row"]


def test_rsna_groups_boxes_and_vinbig_asks_for_two_of_three_radiologists(tmp_path, pseudonyms):
    rsna, vinbig = tmp_path / "rsna", tmp_path / "vinbig"
    table(
        rsna / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target",
        "a,1,1,2,2,1", "a,5,5,2,2,1", "b,,,,,0",
    )  # fmt: skip
    for name in "ab":
        picture(rsna / "stage_2_train_images" / f"{name}.dcm")  # no DICOM: age and view are unknown then
    import_images("rsna", rsna, tmp_path / "out-rsna", Rules(pseudonyms=pseudonyms))
    assert [row["Lung Opacity"] for row in rows(tmp_path / "out-rsna")] == ["1", "0"]
    table(
        vinbig / "train.csv", "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max",
        "i,Nodule,8,R1,1,1,2,2", "i,Nodule,8,R1,3,3,4,4", "i,Effusion,10,R2,,,,", "i,Effusion,10,R3,,,,",
        "j,No finding,14,R1,,,,",
    )  # fmt: skip
    for name in "ij":
        picture(vinbig / "train" / f"{name}.png")
    import_images("vinbig", vinbig, tmp_path / "out", Rules(pseudonyms=pseudonyms))
    assert [(row["Effusion"], row["Nodule"]) for row in rows(tmp_path / "out")] == [("1", "0"), ("0", "0")]
    (vinbig / "annotations").mkdir()
    (vinbig / "train.csv").rename(vinbig / "annotations" / "annotations_train.csv")  # as PhysioNet has it
    assert import_images("vinbig", vinbig, tmp_path / "out", Rules(pseudonyms=pseudonyms)).images == 2


def test_two_images_of_one_person_are_one_patient_where_the_set_says_so(tmp_path, pseudonyms):
    volume = Volume(values=np.ones((2, 3, 4), np.float32), affine=np.eye(4))
    visits = ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-MET-00005-000", "BraTS2021_00005")
    for visit in visits:
        (tmp_path / "brats" / visit).mkdir(parents=True)
        for name in ("t1n", "seg"):
            write_nifti(volume, tmp_path / "brats" / visit / f"{visit}-{name}.nii.gz")
    report = import_images("brats", tmp_path / "brats", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    expected = {pseudonyms.patient(name) for name in ("BraTS-GLI-00005", "BraTS-MET-00005", "BraTS2021_00005")}
    assert report.patients == expected and report.images == 4
    rsna = tmp_path / "rsna"
    table(rsna / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", "a,,,,,0", "b,,,,,0", "c,,,,,0")
    names = {"a": "00000007_000.png", "b": "00000007_011.png", "c": "00000008_000.png"}
    for name in names:
        picture(rsna / f"{name}.dcm")
    assert len(import_images("rsna", rsna, tmp_path / "out", Rules(pseudonyms=pseudonyms)).patients) == 3
    mapping = json.dumps([{"subset_img_id": name, "img_id": image} for name, image in names.items()])
    table(rsna / "pneumonia-challenge-dataset-mappings_2018.json", mapping)
    report = import_images("rsna", rsna, tmp_path / "out", Rules(pseudonyms=pseudonyms))
    assert report.patients == {pseudonyms.patient("7"), pseudonyms.patient("8")}  # as NIH's own
    table(rsna / "pneumonia-challenge-dataset-mappings_2018.json", "{}x")
    with pytest.raises(DataError, match="not RSNA's mapping"):
        import_images("rsna", rsna, tmp_path / "out", Rules(pseudonyms=pseudonyms))


def test_pairs_finds_masks_by_name_and_refuses_a_folder_without_images(tmp_path, pseudonyms):
    for name in ("images/a.png", "images/b.png", "masks/a_mask.png", "masks/c.png"):
        picture(tmp_path / "set" / name)
    import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    (row,) = rows(tmp_path / "out")
    assert Path(row["mask"]).name == "a_mask.png"
    assert [what for what, _ in missed(tmp_path / "out")] == ["image without mask", "mask without image"]
    (tmp_path / "empty").mkdir()
    for kind in KINDS:
        with pytest.raises(DataError, match="hold"):
            import_images(kind, tmp_path / "empty", tmp_path / "nothing", Rules(pseudonyms=pseudonyms))
    assert not (tmp_path / "nothing" / "manifest.csv").exists()


def test_files_of_one_name_in_several_folders_keep_their_own_masks(tmp_path, pseudonyms):
    for name in ("a/scan", "b/scan", "c", "d"):
        picture(tmp_path / "set" / "images" / f"{name}.png")
    for name in ("a/scan_mask", "b/scan", "b/scan_seg", "c", "d"):
        picture(tmp_path / "set" / "masks" / f"{name}.png")
    picture(tmp_path / "set" / "images" / "d.jpg")
    report = import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    paired = {(row["image"], row["mask"]) for row in rows(tmp_path / "out")}
    assert paired == {
        ("../set/images/a/scan.png", "../set/masks/a/scan_mask.png"),
        ("../set/images/c.png", "../set/masks/c.png"),
    }
    assert len(report.patients) == 2
    assert report.unmatched == {"one of several images or masks of one name": 6}
    for folder in "ab":
        picture(tmp_path / "named" / folder / "scan.png")
    rules = LabelRules(join="image", column="name", labels={})
    known = read_labels(table(tmp_path / "t.csv", "name", "scan.png"), rules, pseudonyms)
    with pytest.raises(DataError, match="row 2 of the table fits two images of one name"):
        import_images("pairs", tmp_path / "named", tmp_path / "out", Rules(pseudonyms=pseudonyms, table=known))


# ------------------------------------------------------------------------------------------------------- who withdrew


def test_who_withdrew_is_left_out_by_id_or_by_pseudonym_and_only_pseudonyms_are_kept(tmp_path, pseudonyms):
    source, rules = hospital(tmp_path, pseudonyms)
    listed = table(tmp_path / "optout.csv", "patient_id", "17", pseudonyms.patient("18"))
    names = opted_out(listed, pseudonyms)
    remember(names, tmp_path / "kept.csv")
    again = remembered(tmp_path / "kept.csv")
    for withdrawn in (names, again):
        report = import_images(
            "pairs", source, tmp_path / "out", Rules(pseudonyms=pseudonyms, table=rules.table, withdrawn=withdrawn)
        )
        assert {row["patient_id"] for row in rows(tmp_path / "out")} == {pseudonyms.patient("19")}
        assert len(report.withdrawn) == 2
    kept = (tmp_path / "kept.csv").read_text().split()
    assert "17" not in kept and pseudonyms.patient("17") in kept
    assert (tmp_path / "kept.csv").stat().st_mode & 0o077 == 0


def test_who_withdrew_is_left_out_also_under_the_images_own_name(tmp_path, pseudonyms):
    source, rules = hospital(tmp_path, pseudonyms)  # whose table calls the patient of 0.png and 1.png 17
    names = opted_out(table(tmp_path / "optout.csv", "patient_id", "0"), pseudonyms)
    import_images("pairs", source, tmp_path / "out", replace(rules, withdrawn=names))
    assert {Path(row["image"]).stem for row in rows(tmp_path / "out")} == {"1", "2", "3"}


def test_an_image_that_the_table_gives_to_two_patients_stays_out_also_with_a_mask(tmp_path, pseudonyms):
    for name in ("images/a.png", "images/b.png", "masks/a.png", "masks/b.png"):
        picture(tmp_path / "set" / name)
    by_name = LabelRules(join="image", column="name", columns={"patient_id": "number"}, labels={})
    known = read_labels(
        table(tmp_path / "t.csv", "name,number", "a.png,17", "a.png,18", "b.png,19"), by_name, pseudonyms
    )
    withdrawn = opted_out(table(tmp_path / "optout.csv", "patient_id", "18"), pseudonyms)
    report = import_images(
        "pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms, table=known, withdrawn=withdrawn)
    )
    assert {Path(row["image"]).stem for row in rows(tmp_path / "out")} == {"b"}
    assert report.unmatched[SEVERAL] == 1


def test_who_is_on_the_list_and_not_in_the_archive_is_told(tmp_path, pseudonyms, capsys):
    for name in ("a", "b"):
        picture(tmp_path / "in" / f"{name}.png")
    picture(tmp_path / "in" / "masks" / "a.png")
    listed = table(tmp_path / "optout.csv", "patient_id", "b", "017", "")
    picture(tmp_path / "in" / "masks" / "b.png")
    settings = {"table": None, "labels": None, "uncertain": "ignore"}
    import_data("pairs", tmp_path / "in", tmp_path / "out", pseudonyms, opt_out=listed, **settings)
    assert "1 of 2 on the opt-out list are here" in capsys.readouterr().err
    assert missed(tmp_path / "out") == [("no image of this patient", "row 3 of the opt-out list")]


def test_who_is_on_the_sites_own_list_is_left_out_also_beside_another(tmp_path, pseudonyms, capsys):
    for name in ("a", "b", "c"):
        picture(tmp_path / "in" / f"{name}.png")
        picture(tmp_path / "in" / "masks" / f"{name}.png")
    given, standing = (table(tmp_path / f"{name}.csv", "patient_id", name) for name in "bc")
    import_data(
        "pairs", tmp_path / "in", tmp_path / "my out", pseudonyms, table=None, labels=None, uncertain="ignore",
        opt_out=given, standing=standing, check=" --site 'north wing'",
    )  # fmt: skip
    assert {Path(row["image"]).stem for row in rows(tmp_path / "my out")} == {"a"}
    assert {pseudonyms.patient(name) for name in "bc"} <= remembered(tmp_path / "my out" / "opt-out.csv")
    told = capsys.readouterr()
    assert "1 of 1 on the opt-out list are here" in told.err and "left out: 2 patients who withdrew" in told.err
    assert told.out.endswith(f"next: fedmed data check '{tmp_path / 'my out'}' --site 'north wing'\n")


@pytest.mark.parametrize("lacks", ["row", "mask"])
def test_who_withdrew_is_here_without_a_row_or_a_mask(tmp_path, pseudonyms, capsys, lacks):
    for name in ("images/a.png", "images/b.png", *(["masks/a.png"] if lacks == "mask" else [])):
        picture(tmp_path / "in" / name)
    settings = {"table": None, "labels": None, "uncertain": "ignore"}
    if lacks == "row":
        settings["table"] = table(tmp_path / "t.csv", "image,Erguss", "a.png,1")
        settings["labels"] = tmp_path / "labels.toml"
        text = (
            'join = "image"\ncolumn = "image"\n[labels.e]\ncolumns = ["Erguss"]\npositive = ["1"]\nnegative = ["0"]\n'
        )
        settings["labels"].write_text(text)
    listed = table(tmp_path / "optout.csv", "patient_id", "b")
    import_data("pairs", tmp_path / "in", tmp_path / "out", pseudonyms, opt_out=listed, **settings)
    assert "1 of 1 on the opt-out list are here" in capsys.readouterr().err
    assert {what for what, _ in missed(tmp_path / "out")} <= {"image without mask"}


def test_the_first_import_writes_a_guess_for_its_owner_and_calls_it_no_error(tmp_path, capsys):
    image = picture(tmp_path / "in" / "images" / "a.png")
    sheet = table(tmp_path / "labels.csv", "image,Erguss,Grade", "b.png,1,mild")
    words = (tmp_path / "in", "--out", tmp_path / "out", "--table", sheet)
    with pytest.raises(ConfigError, match="no kind of archive"):  # and no word about keys yet
        command("data", "import", "xray", *words)
    assert command("data", "import", "pairs", *words, "--keys", tmp_path / "keys") == 1
    said = capsys.readouterr()
    assert said.out.startswith("wrote ") and "nothing is imported yet" in said.out
    assert (
        "guessed: rows belong to images by image; labels: 1; columns not used: see its last line\n" in said.out
        and said.err.count("\n") == 1
    )
    assert said.err.startswith("made new keys in")
    assert (tmp_path / "out" / "labels.toml").stat().st_mode & 0o077 == 0
    with pytest.raises(DataError, match=r"which ones: .*unmatched\.csv"):
        command("data", "import", "pairs", *words, "--keys", tmp_path / "keys")
    assert missed(tmp_path / "out") == [("image without row", str(image)), ("row without image", "row 2 of the table")]
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_the_kept_list_of_who_withdrew_does_not_grow_with_every_import(tmp_path, pseudonyms):
    listed = table(tmp_path / "optout.csv", "patient_id", "17", pseudonyms.patient("18"))
    archive, out = tmp_path / "in", tmp_path / "out"
    settings = {"table": None, "labels": None, "uncertain": "ignore"}
    for name in ("images/a.png", "masks/a_mask.png"):
        picture(archive / name)
    import_data("pairs", archive, out, pseudonyms, opt_out=listed, **settings)
    first = (out / "opt-out.csv").read_text()
    for opt_out in (listed, None, out / "opt-out.csv"):
        import_data("pairs", archive, out, pseudonyms, opt_out=opt_out, **settings)
        assert (out / "opt-out.csv").read_text() == first
    table(out / "opt-out.csv", "patient_id", "17")  # put there by hand: not what fedmed keeps
    with pytest.raises(DataError, match="--opt-out"):
        import_data("pairs", archive, out, pseudonyms, opt_out=None, **settings)


def test_a_list_of_withdrawals_that_cannot_be_read_stops_everything(tmp_path, pseudonyms):
    headless = table(tmp_path / "headless.csv", "17", "18")
    for path in (headless, tmp_path / "missing.csv"):
        with pytest.raises(DataError) as raised:
            opted_out(path, pseudonyms)
        assert raised.value.public == "the site's list of patients who withdrew cannot be read"


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")
def test_real_nih_images_find_their_rows(tmp_path, pseudonyms):
    source = tmp_path / "nih"
    source.mkdir()
    (source / "images").symlink_to(REAL / "cxr" / "dev" / "nih_cc")
    (source / "Data_Entry_2017.csv.gz").symlink_to(
        REAL / "tabular" / "dev" / "nih_cxr14" / "Data_Entry_2017_v2020.csv.gz"
    )
    report = import_images("nih", source, tmp_path / "out", Rules(pseudonyms=pseudonyms))
    with (REAL / "cxr" / "dev" / "metadata.csv").open(newline="") as file:
        truth = {row["image_id"]: row for row in csv.DictReader(file) if row["hospital"] == "nih_cc"}
    read = {Path(row["image"]).stem: row for row in rows(tmp_path / "out")}
    assert read.keys() == truth.keys() and len(report.patients) == len({row["patient_id"] for row in truth.values()})
    for stem, row in truth.items():
        assert [read[stem][name] for name in NIH_LABELS] == [str(int(float(row[name]))) for name in NIH_LABELS]
    assert report.unmatched["row without image"] == 112_120 - len(read)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")
def test_a_real_hospital_table_is_joined_with_its_images(tmp_path, pseudonyms):
    rules = LabelRules(
        join="image", column="path", columns={"patient_id": "patient_id", "sex": "sex", "site": "hospital"},
        labels={"covid": {"columns": ("COVID19",), "positive": ("1", "1.0"), "negative": ("0", "0.0")}},
    )  # fmt: skip
    known = read_labels(REAL / "cxr" / "dev" / "metadata.csv", rules, pseudonyms)
    report = import_images(
        "pairs", REAL / "cxr" / "dev" / "hannover_mhh", tmp_path / "out", Rules(pseudonyms=pseudonyms, table=known)
    )
    read = rows(tmp_path / "out")
    assert report.images == len(list((REAL / "cxr" / "dev" / "hannover_mhh").glob("*.*g")))
    assert {row["covid"] for row in read} == {"1"} and {row["site"] for row in read} == {"hannover_mhh"}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")
def test_real_volumes_are_paired_with_their_masks(tmp_path, pseudonyms):
    hippocampus = REAL / "vol3d" / "dev" / "msd_hippocampus"
    report = import_images("pairs", hippocampus, tmp_path / "pairs", Rules(pseudonyms=pseudonyms))
    assert report.images == report.masks == len(list((hippocampus / "images").iterdir()))
    brats = REAL / "vol3d" / "dev" / "brats2013_2mm"
    report = import_images("brats", brats, tmp_path / "brats", Rules(pseudonyms=pseudonyms))
    assert report.images == len(list(brats.iterdir())) and all(
        row["image"].count(";") == 3 for row in rows(tmp_path / "brats")
    )
