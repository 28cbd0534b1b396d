"""Manifests: what is accepted, and one clear line for what is not. Splits by patient."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed.config import TaskConfig
from fedmed.errors import DataError
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.split import evaluation_rows, held_out

TWO = TaskConfig(labels=("nodule", "effusion"))
LUNG = TaskConfig(kind="segmentation", labels=("lung",))
HEADER = "patient_id,image,nodule,effusion"


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_rows_labels_and_paths(tmp_path: Path) -> None:
    path = manifest(tmp_path, f"\ufeff{HEADER},view\nP1,a.dcm,1,,AP\n\nP2, sub/b.png ,0.0,1.0,PA\n")
    first, second = read_manifest(path, TWO).rows
    assert (first.number, second.number) == (2, 4)
    assert first.labels[0] == 1
    assert math.isnan(first.labels[1])
    assert second.labels == (0, 1)
    assert second.image == tmp_path / "sub/b.png"
    assert second.mask is None
    assert second.split == ""


@pytest.mark.parametrize("before", ["", "sep=;\n", '\ufeff"SEP=;"\r\n'])
def test_reads_what_a_german_or_french_excel_saved(tmp_path: Path, before: str) -> None:
    plain = manifest(tmp_path, f"{HEADER}\nP1,a.dcm;b.dcm,1,0\nP2,c.dcm;,0,\n")
    expected = [(row.number, row.modalities, str(row.labels)) for row in read_manifest(plain, TWO).rows]
    saved = manifest(tmp_path, f'{before}{HEADER.replace(",", ";")}\nP1;"a.dcm;b.dcm";1;0\nP2;"c.dcm;";0;\n')
    assert [(row.number, row.modalities, str(row.labels)) for row in read_manifest(saved, TWO).rows] == expected
    comma = manifest(tmp_path, f"{HEADER},which of a;b;c;d;e\nP1,a,1,0,a\nP2,b,0,,e\n")
    assert len(read_manifest(comma, TWO).rows) == 2


def test_a_first_line_that_names_no_columns_is_not_quoted(tmp_path: Path) -> None:
    """It is a patient's row; what is raised stands in the site's log."""
    for row in ("patient_17,SMITH^JOHN.dcm,1,0", "17,SMITH^JOHN.dcm,1,0", "17,17,SMITH^JOHN,SMITH^JOHN"):
        with pytest.raises(DataError, match="the first line names the columns") as caught:
            read_manifest(manifest(tmp_path, f"{row}\nP2,b.dcm,1,0"), TWO)
        assert "17" not in str(caught.value).replace(str(tmp_path), "") and "SMITH" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the manifest is empty"),
        (f"{HEADER}\n", "no rows"),
        ("patient_id,nodule,effusion\nP1,1,0", 'no column "image"'),
        ("patient_id,image,Nodules,effusion\nP1,a,1,0", 'no column "nodule"; the nearest is "Nodules"'),
        (f"{HEADER}\nP1,a,1,0\nP2,b,2,0", 'row 3: "nodule" is neither 0, 1 nor empty'),
        (f"{HEADER}\nP1,a,yes,0", "row 2"),
        (f"{HEADER}\nP1,a,nan,0", "row 2"),
        (f"{HEADER}\nP1,a,1", "row 2 has 3 cells, the header has 4"),
        (f"{HEADER}\n,a,1,0", "row 2 has no patient_id"),
        (f"{HEADER}\nP1,,1,0", "row 2 has no image"),
        (f"{HEADER},nodule\nP1,a,1,0,1", "appears twice"),
        (f"{HEADER}\nP1,a,1,0\nP2,b,1,0\nP1,./a,1,0", "rows 2 and 4 name the same image"),
        (f"{HEADER}\nP1,ct/,1,0\nP2,b,1,0\nP3,./ct/sub/3.dcm,1,0", "row 2 names the folder in which row 4's"),
        (f"{HEADER},split\nP1,a,1,0,train\nP1,b,1,0,test\nP2,c,1,0,val",
         r"1 patient is in more than one split \(rows 2, 3\)"),
        (f"{HEADER},split\nP1,a,1,0,train\nP2,b,1,0,", r"1 rows have no split while others have \(row 3\)"),
        (f"{HEADER},split\nP1,a,1,0,holdout", "row 2: split is none of"),
    ],
)  # fmt: skip
def test_refuses_in_one_line_that_names_no_patient(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read_manifest(manifest(tmp_path, text), TWO)
    assert "\n" not in str(caught.value)
    assert "P1" not in str(caught.value).replace(str(tmp_path), "")


def test_missing_file_and_what_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such manifest"):
        read_manifest(tmp_path / "none.csv", TWO)
    (tmp_path / "x.csv").write_bytes(b"patient_id,image\n\xff\xfe\x00,a")
    with pytest.raises(DataError, match="not a CSV in UTF-8"):
        read_manifest(tmp_path / "x.csv", TWO)


def test_segmentation_needs_a_mask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='no column "mask"'):
        read_manifest(manifest(tmp_path, "patient_id,image\nP1,a"), LUNG)
    with pytest.raises(DataError, match="row 2 has no mask"):
        read_manifest(manifest(tmp_path, "patient_id,image,mask\nP1,a,"), LUNG)
    row = read_manifest(manifest(tmp_path, "patient_id,image,mask\nP1,a,m.png"), LUNG).rows[0]
    assert row.mask == tmp_path / "m.png"
    assert row.labels == ()


def test_a_row_may_name_a_file_a_folder_or_a_volume(tmp_path: Path) -> None:
    names = ["a.dcm", "series/", "b.nii.gz", "series-2", "../elsewhere/c.png"]
    rows = "\n".join(f"P{i},{name},m{i}/" for i, name in enumerate(names))
    read = read_manifest(manifest(tmp_path, f"patient_id,image,mask\n{rows}"), LUNG)
    assert [row.image for row in read.rows] == [tmp_path / name for name in names]
    assert read.rows[1].mask == tmp_path / "m1"


def test_a_manifests_own_split_wins(tmp_path: Path) -> None:
    names = ["train", "validation", "valid", "val", "Test"]
    rows = "\n".join(f"P{i},{i}.dcm,1,0,{name}" for i, name in enumerate(names))
    read = read_manifest(manifest(tmp_path, f"{HEADER},split\n{rows}"), TWO)
    assert [row.split for row in read.rows] == ["train", "validation", "validation", "validation", "test"]
    assert evaluation_rows(read, 0.5, 1, "x").tolist() == [False, True, True, True, True]


patients = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=40)


@given(patients=patients, share=st.floats(0, 0.99), seed=st.integers(0, 2**62))
def test_split_is_by_patient_and_order_does_not_matter(patients: list[str], share: float, seed: int) -> None:
    held = held_out(patients, share=share, seed=seed, name="site-1")
    order = np.random.default_rng(0).permutation(len(patients))
    np.testing.assert_array_equal(
        held[order], held_out([patients[i] for i in order], share=share, seed=seed, name="site-1")
    )
    sides = {patient: {bool(h) for p, h in zip(patients, held, strict=True) if p == patient} for patient in patients}
    assert all(len(side) == 1 for side in sides.values())
    if share == 0:
        assert not held.any()
    elif len(sides) > 1:
        assert held.any()
        assert not held.all()


@given(patients=patients, share=st.floats(0, 0.99), seed=st.integers(0, 2**62))
def test_p07_without_forced_sides_nobody_moves_when_a_patient_leaves(
    patients: list[str], share: float, seed: int
) -> None:
    def sides(some: list[str]) -> dict[str, bool]:
        return dict(zip(some, held_out(some, share=share, seed=seed, name="a", both=False), strict=True))

    whole = sides(patients)
    for gone in whole:
        left = sides([patient for patient in patients if patient != gone])
        assert left == {patient: side for patient, side in whole.items() if patient != gone}


def test_split_has_about_the_share_and_depends_on_seed_and_name() -> None:
    patients = [f"P{i}" for i in range(4000)]
    one = held_out(patients, share=0.2, seed=1, name="a")
    assert abs(one.mean() - 0.2) < 0.02
    for other in (held_out(patients, share=0.2, seed=2, name="a"), held_out(patients, share=0.2, seed=1, name="b")):
        assert 0.1 < (one & other).sum() / one.sum() < 0.3


def test_a_new_patient_moves_nobody() -> None:
    patients = [f"P{i}" for i in range(50)]
    before = held_out(patients, share=0.3, seed=1, name="a")
    np.testing.assert_array_equal(before, held_out([*patients, "new"], share=0.3, seed=1, name="a")[:-1])


def test_split_of_known_patients_never_changes() -> None:
    """Pinned: a change here would move patients from training to evaluation in every existing run."""
    assert held_out(["P1", "P2", "P3", "P4", "P5", "P6"], share=0.5, seed=7, name="site-1").tolist() == [
        True, False, False, False, True, False,
    ]  # fmt: skip
