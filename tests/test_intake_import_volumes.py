"""Importing sets of volumes: every sequence has its place, and a number of a mask means the same everywhere."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from import_files import missed, rows, table

from fedmed.cli.intake import import_data
from fedmed.config import TaskConfig
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.volumes.nifti import read_nifti, write_nifti
from fedmed.imaging.volumes.volume import Volume
from fedmed.intake.importing import Rules, import_images
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import make_keys


@pytest.fixture(scope="module")
def pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Pseudonyms:
    return Pseudonyms(keys=make_keys(tmp_path_factory.mktemp("site") / "keys"))


def patients_of(folder, masks, **sequences):
    """BraTS patients: what their masks hold, and which sequences they have; a mask of None is missing."""
    affine = np.diag([2.0, 1.0, 1.5, 1.0])
    for patient, held in masks.items():
        (folder / patient).mkdir(parents=True, exist_ok=True)
        for name in sequences.get(patient, ("t1", "flair")):
            write_nifti(Volume(values=np.ones((2, 3, 4), np.float32), affine=affine), folder / patient / f"{name}.nii")
        if held is not None:
            values = np.resize(np.array(held, np.uint8), (2, 3, 4))
            write_nifti(Volume(values=values, affine=affine), folder / patient / f"{patient}_seg.nii.gz")
    return folder


def test_brats_keeps_the_place_of_a_missing_sequence_and_of_one_that_nobody_has(tmp_path, pseudonyms):
    names = {"B1": ("t1ce", "flair"), "B2": ("t2", "flair"), "B3": ("flair",)}
    source = patients_of(tmp_path / "brats", {"B1": [0, 1], "B2": [0, 1], "B3": None}, **names)
    (source / "B2" / "B2_seg.nii.gz").rename(source / "B2" / "W39_1998.09.19_Segm.nii.gz")  # as Kaggle has one
    for hidden in ("B1/._B1_t1.nii", "__MACOSX/B1/B1_flair.nii", "__MACOSX/B1/B1_seg.nii"):
        table(source / hidden, "AppleDouble")
    import_images("brats", source, tmp_path / "out", Rules(pseudonyms=pseudonyms))
    first, second = rows(tmp_path / "out")
    assert [Path(name).name for name in first["image"].split(";")] == ["flair.nii", "", "t1ce.nii", ""]
    assert [Path(name).name for name in second["image"].split(";")] == ["flair.nii", "", "", "t2.nii"]
    assert Path(second["mask"]).name == "W39_1998.09.19_Segm.nii.gz"
    assert missed(tmp_path / "out") == [("image without mask", "B3")]
    task = TaskConfig(kind="segmentation", labels=("tumour",))
    assert read_manifest(tmp_path / "out" / "manifest.csv", task).modalities == 4


def test_enhancing_tumour_has_the_number_of_2023_in_every_year(tmp_path, pseudonyms, capsys):
    settings = {"table": None, "labels": None, "opt_out": None, "uncertain": "ignore"}
    old = patients_of(tmp_path / "old", {"BraTS20_1": [0, 1, 2, 4], "BraTS20_2": [0, 1, 2]})
    for _ in range(2):
        import_data("brats", old, tmp_path / "out", pseudonyms, **settings)
        assert "1 mask written anew" in capsys.readouterr().out
    before = read_nifti(old / "BraTS20_1" / "BraTS20_1_seg.nii.gz", labels=True)
    new, kept = (tmp_path / "out" / row["mask"] for row in rows(tmp_path / "out"))
    after = read_nifti(new, labels=True)
    assert (after.values == np.where(before.values == 4, 3, before.values)).all() and 3 in after.values
    assert (after.affine == before.affine).all() and new.is_relative_to(tmp_path / "out" / "masks")
    assert kept.resolve() == (old / "BraTS20_2" / "BraTS20_2_seg.nii.gz").resolve()
    for name, masks in {
        "2013": {"B1": [0, 1, 2, 4], "B2": [0, 3, 4]},  # 3 and 4 are two classes there
        "2024": {"BraTS-GLI-00005-000": [0, 1, 2, 4]},  # whose 4 is a resection cavity
    }.items():
        import_data("brats", patients_of(tmp_path / name, masks), tmp_path / f"out-{name}", pseudonyms, **settings)
        assert not (tmp_path / f"out-{name}" / "masks").exists()


def test_what_macos_packs_beside_files_is_no_patient(tmp_path, pseudonyms):
    for name in ("imagesTr/h_1.nii.gz", "imagesTr/._h_1.nii.gz", "labelsTr/h_1.nii.gz", "labelsTr/._h_1.nii.gz"):
        table(tmp_path / "set" / name, "x")
    import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    assert [row["image"] for row in rows(tmp_path / "out")] == ["../set/imagesTr/h_1.nii.gz"]
    assert missed(tmp_path / "out") == []


def test_numbered_channels_are_modalities_and_several_volumes_in_one_file_are_left_out(tmp_path, pseudonyms):
    volume = Volume(values=np.ones((2, 3, 4), np.float32), affine=np.eye(4))
    for name in ("a_0000", "a_0001", "sub/b_0001", "c_0003"):
        (tmp_path / "set" / "imagesTr" / name).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(volume, tmp_path / "set" / "imagesTr" / f"{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 3, 2, 4), np.float32), np.eye(4)), tmp_path / "set/imagesTr/d.nii.gz")
    for name in ("a", "sub/b", "c_0003", "d"):
        (tmp_path / "set" / "labelsTr" / name).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(volume, tmp_path / "set" / "labelsTr" / f"{name}.nii.gz")
    report = import_images("pairs", tmp_path / "set", tmp_path / "out", Rules(pseudonyms=pseudonyms))
    images = "../set/imagesTr/"
    assert {row["mask"].removeprefix("../set/labelsTr/"): row["image"] for row in rows(tmp_path / "out")} == {
        "a.nii.gz": f"{images}a_0000.nii.gz;{images}a_0001.nii.gz",
        "sub/b.nii.gz": f";{images}sub/b_0001.nii.gz",
        "c_0003.nii.gz": f"{images}c_0003.nii.gz;",
    }
    ((what, where),) = missed(tmp_path / "out")
    assert "each modality to a file of its own, CASE_0000.nii.gz" in what and where == "imagesTr/d.nii.gz"
    assert report.patients == {pseudonyms.patient(name) for name in ("a", "sub/b", "c_0003")}
