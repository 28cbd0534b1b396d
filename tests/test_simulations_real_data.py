"""The simulations on real data: nobody is trained on and judged, every file is named, and their runs can begin."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_sets import REAL

from fedmed import config as run_file
from fedmed.cli import main as fedmed_command
from fedmed.imaging.manifest import Manifest, read_manifest

ROOT = Path(__file__).parent.parent / "simulations"
SETS = {"hippocampus": "vol3d", "brats-deepmedic": "vol3d", "isbi-membranes": "seg2d", "nih-resolution": "cxr"}
FOLDS = {"hippocampus": 1, "brats-deepmedic": 4, "isbi-membranes": 5, "nih-resolution": 1}


def script(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _path_is_kept() -> Iterator[None]:
    """A prepare.py puts the folder of the simulations on the path."""
    before = sys.path.copy()
    yield
    sys.path[:] = before


def metadata(folder: Path, records: list[dict[str, str]], files: list[str]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with (folder / "dev" / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The four sets with empty files: prepare.py looks at none of them."""
    pairs = [("msd_hippocampus", f"hippocampus_{number:03d}") for number in range(12)]
    records, files = [], []
    for task, patient in pairs:
        image, label = f"dev/{task}/{patient}.nii.gz", f"dev/{task}/{patient}-label.nii.gz"
        records.append({"task": task, "image": image, "label": label, "patient_id": patient})
        files += [image, label]
    for number in range(4):
        folder = f"dev/brats/{number}"
        label = f"{folder}/label.nii.gz"
        records.append({"task": "brats2013_2mm", "image": folder, "label": label, "patient_id": f"brats-{number}"})
        files += [f"{folder}/{name}.nii.gz" for name in ("flair", "t1c", "label")]
    metadata(tmp_path / "data/vol3d", records, files)
    slices = [
        {"task": "isbi2012_membrane", "image": f"dev/i{n}.png", "mask": f"dev/m{n}.png", "patient_id": f"slice{n:02d}"}
        for n in range(10)
    ]
    metadata(tmp_path / "data/seg2d", slices, [row[kind] for row in slices for kind in ("image", "mask")])
    labels = dict.fromkeys(("Effusion", "Infiltration", "Pneumonia", "Edema", "Atelectasis"), "1.0")
    xrays = [{"hospital": "nih_cc", "path": f"dev/{n}.jpg", "patient_id": f"nih-{n // 2}", **labels} for n in range(24)]
    metadata(tmp_path / "data/cxr", xrays, [row["path"] for row in xrays])
    return tmp_path / "data"


def federations(out: Path) -> list[dict[str, Manifest]]:
    """The manifests of every run file below a folder, by site."""
    found = []
    for path in sorted(out.rglob("run.toml")):
        config = run_file.load(path)
        manifests = map(Path, (*config.data.sites, config.data.server))
        found.append({each.parent.name: read_manifest(each, config.task) for each in manifests})
    return found


def assert_nobody_is_trained_on_and_judged(found: list[dict[str, Manifest]]) -> None:
    for federation in found:
        for one, other in combinations(federation.values(), 2):
            assert not set(one.patients) & set(other.patients)
        rows = [row for manifest in federation.values() for row in manifest.rows]
        assert all(path.is_file() for row in rows for path in (*row.images, *filter(None, [row.mask])))


@pytest.mark.parametrize("name", SETS)
def test_prepared_manifests_share_no_patient(data: Path, tmp_path: Path, name: str) -> None:
    assert script(ROOT / name / "prepare.py").main([str(data), str(tmp_path / "out")]) == 0
    found = federations(tmp_path / "out")
    assert len(found) == FOLDS[name]
    assert_nobody_is_trained_on_and_judged(found)
    if FOLDS[name] > 1:  # every patient judges once
        judges = [patient for federation in found for patient in federation["server"].patients]
        everybody = {patient for manifest in found[0].values() for patient in manifest.patients}
        assert sorted(judges) == sorted(everybody)
    texts = [path.read_text() for path in (tmp_path / "out").rglob("manifest.csv")]
    assert not any(str(tmp_path) in text for text in texts)


def test_brats_rows_name_two_modalities_and_folds_of_slices_are_neighbours(data: Path, tmp_path: Path) -> None:
    script(ROOT / "brats-deepmedic" / "prepare.py").main([str(data), str(tmp_path / "brats")])
    for federation in federations(tmp_path / "brats"):
        for manifest in federation.values():
            assert [image.name for image in manifest.rows[0].images] == ["flair.nii.gz", "t1c.nii.gz"]
    script(ROOT / "isbi-membranes" / "prepare.py").main([str(data), str(tmp_path / "isbi")])
    judges = [federation["server"].patients for federation in federations(tmp_path / "isbi")]
    assert judges == [(f"slice{n:02d}", f"slice{n + 1:02d}") for n in range(0, 10, 2)]


@pytest.mark.parametrize("missing", ["dev/metadata.csv", "dev/brats/2/t1c.nii.gz"])
def test_a_missing_file_is_one_clear_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    (data / "vol3d" / missing).unlink()
    assert script(ROOT / "brats-deepmedic" / "prepare.py").main([str(data), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and missing in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


patients = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30)


@given(patients, st.integers(1, 5))
def test_dealing_loses_nothing_and_tears_no_patient(ids: list[str], hands: int) -> None:
    rows = [{"patient_id": patient, "image": str(number)} for number, patient in enumerate(ids)]
    parts = script(ROOT / "manifests.py").dealt(rows, hands)
    assert sorted(row["image"] for part in parts for row in part) == sorted(row["image"] for row in rows)
    for one, other in combinations(parts, 2):
        assert not {row["patient_id"] for row in one} & {row["patient_id"] for row in other}


def test_the_table_shows_values_intervals_and_their_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, dice in enumerate((0.5, 0.7)):
        metric = {"value": dice, "low": dice - 0.1, "high": dice + 0.1, "n": 4}
        (tmp_path / f"fold-{number}").mkdir()
        facts = {"server": {"metrics": {"dice": metric, "hd95": {"value": None, "low": None, "high": None, "n": 0}}}}
        text = json.dumps({**facts, "timing": {"total_s": 61.4}, "status": "completed"})
        (tmp_path / f"fold-{number}" / "result.json").write_text(text)
    table = script(ROOT / "table.py")
    runs = [str(tmp_path / f"fold-{number}") for number in range(2)]
    assert table.main([*runs, "--metrics", "dice", "hd95", "--mean"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| run | patients | dice | hd95 | s | status |"
    assert lines[2] == "| fold-0 | 4 | 0.500 (0.400–0.600) | null | 61 | completed |"
    assert lines[4] == "| mean ± standard deviation | | 0.600 ± 0.141 | null | | |"
    assert table.main([str(tmp_path / "none"), "--metrics", "dice"]) == 1


def test_scores_of_membranes_are_those_of_counted_pixels() -> None:
    import numpy as np

    score = script(ROOT / "isbi-membranes" / "score.py").score
    truth, found = np.array([[1, 1, 1, 0]], bool), np.array([[1, 1, 0, 0]], bool)
    assert score(found, truth) == pytest.approx((1 / 4, 2 / 3, 4 / 5))


@pytest.mark.parametrize("name", SETS)
def test_the_run_can_begin_on_the_real_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (REAL / SETS[name] / "dev").is_dir():
        pytest.skip(f"the real images ({SETS[name]}) are not on this machine")
    assert script(ROOT / name / "prepare.py").main([str(REAL), str(tmp_path)]) == 0
    assert_nobody_is_trained_on_and_judged(federations(tmp_path))
    run = sorted(tmp_path.rglob("run.toml"))[0]
    monkeypatch.setattr(sys, "argv", ["fedmed", "simulate", str(run), "--dry-run"])
    with pytest.raises(SystemExit) as end:
        fedmed_command()
    said = capsys.readouterr()
    assert not end.value.code, said.err
    assert "Nothing was written" in said.out
