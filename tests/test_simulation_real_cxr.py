"""The real-cxr simulation: its manifests mix no patients, mask what a hospital did not annotate, and can be read."""

import csv
import importlib.util
import math
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.federated.virtual_hospitals import planned
from fedmed.imaging.manifest import Manifest, read_manifest

FOLDER = Path(__file__).parent.parent / "simulations" / "real-cxr"
specification = importlib.util.spec_from_file_location("real_cxr_prepare", FOLDER / "prepare.py")
prepare = importlib.util.module_from_spec(specification)
specification.loader.exec_module(prepare)

COVID = prepare.COVID_HOSPITALS
PNEUMONIA = prepare.NIH_LABELS.index("Pneumonia")
ABOUT = {"split": "dev", "sex": "F", "age": "61.0", "view": "PA"}


def table(path: Path, records: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), restval="")
        writer.writeheader()
        writer.writerows(records)


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def xrays(data: Path) -> None:
    """Sixteen NIH patients, some of 64 pixels that must stay out, and four of every other hospital; two images each."""
    records: list[dict[str, object]] = []
    for hospital in ("nih_cc", "nih_cc_64px", *COVID):
        for number in range(32 if hospital == "nih_cc" else 8):
            path = f"dev/{hospital}/{number}.png"
            picture(data / "cxr" / path, np.full((8, 8), number))
            patient = f"{'nih' if hospital.startswith('nih') else hospital}-{number // 2}"
            sick = number % 3 == 0 if hospital.startswith("nih") else 1
            labels = {label: f"{float(sick)}" if hospital.startswith("nih") else "" for label in prepare.NIH_LABELS}
            whose = {"hospital": hospital, "path": path, "patient_id": patient}
            records.append({**whose, **ABOUT, **labels, "Pneumonia_any": int(sick)})
    table(data / "cxr/dev/metadata.csv", records)


def masked_xrays(data: Path) -> None:
    records: list[dict[str, object]] = []
    for hospital in prepare.LUNG_HOSPITALS:
        for number in range(8):
            row = {kind: f"dev/cxr_lungs/{kind}s/{hospital}-{number}.png" for kind in ("image", "mask")}
            for path in row.values():
                picture(data / "seg2d" / path, np.eye(8) * 255)
            records.append(
                {"task": "cxr_lungs", "hospital": hospital, "patient_id": f"{hospital}-{number // 2}", **row}
            )
    records.append({"task": "isbi2012_membrane", "patient_id": "slice00", "image": "a", "mask": "b", "hospital": ""})
    table(data / "seg2d/dev/metadata.csv", records)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    xrays(tmp_path / "data")
    masked_xrays(tmp_path / "data")
    return tmp_path / "data"


def manifests(run: Path) -> tuple[RunConfig, dict[str, Manifest]]:
    """The run and all its manifests by site, the server's too."""
    config = run_file.load(run)
    paths = map(Path, (*config.data.sites, config.data.server))
    return config, {path.parent.name: read_manifest(path, config.task) for path in paths}


def assert_whole(out: Path, name: str, sites: set[str]) -> dict[str, Manifest]:
    """All sites are there, no patient is in two of them, and every file that they name exists."""
    config, found = manifests(out / name / "run.toml")
    assert set(found) == sites | {"server"}
    assert {hospital.name for hospital in planned(config)} == sites
    for one, other in combinations(found.values(), 2):
        assert not set(one.patients) & set(other.patients)
    rows = [row for manifest in found.values() for row in manifest.rows]
    assert all(path.is_file() for row in rows for path in (row.image, row.mask) if path)
    return found


def test_every_patient_is_at_one_site_and_every_nih_image_is_used(data: Path, tmp_path: Path):
    assert prepare.main([str(data), str(tmp_path / "out")]) == 0
    found = assert_whole(tmp_path / "out", "classification", {*prepare.NIH_SITES, *COVID})
    nih = [row.image.name for site in (*prepare.NIH_SITES, "server") for row in found[site].rows]
    assert sorted(nih) == sorted(f"{number}.png" for number in range(32))
    assert len(set(found["server"].patients)) == 4
    assert not any("nih_cc_64px" in str(row.image) for manifest in found.values() for row in manifest.rows)


def test_what_a_hospital_did_not_annotate_is_masked(data: Path, tmp_path: Path):
    prepare.main([str(data), str(tmp_path / "out")])
    _, found = manifests(tmp_path / "out" / "classification" / "run.toml")
    for hospital in COVID:
        for row in found[hospital].rows:
            known = [index for index, value in enumerate(row.labels) if not math.isnan(value)]
            assert known == [PNEUMONIA]
    assert all(not any(map(math.isnan, row.labels)) for site in prepare.NIH_SITES for row in found[site].rows)


def test_the_server_of_the_lungs_has_patients_of_every_hospital(data: Path, tmp_path: Path):
    prepare.main([str(data), str(tmp_path / "out")])
    found = assert_whole(tmp_path / "out", "lungs", set(prepare.LUNG_HOSPITALS))
    assert {patient.rpartition("-")[0] for patient in found["server"].patients} == set(prepare.LUNG_HOSPITALS)


def test_preparing_twice_writes_the_same_relative_paths(data: Path, tmp_path: Path):
    for out in ("one", "two"):
        prepare.main([str(data), str(tmp_path / out)])
    texts = [
        {path.relative_to(tmp_path / out): path.read_text() for path in (tmp_path / out).rglob("*.csv")}
        for out in ("one", "two")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 14
    assert not any(str(tmp_path) in text for text in texts[0].values())


@pytest.mark.parametrize("missing", ["cxr/dev/metadata.csv", "seg2d/dev/metadata.csv", "cxr/dev/nih_cc/0.png"])
def test_a_missing_file_is_one_clear_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, missing: str):
    (data / missing).unlink()
    assert prepare.main([str(data), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and missing in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def real_data() -> Path | None:
    """The folder that FEDMED_DATA names, if it holds the sets."""
    folder = Path(os.environ.get("FEDMED_DATA") or "/nonexistent")
    return folder.absolute() if all((folder / name / "dev").is_dir() for name in ("cxr", "seg2d")) else None


@pytest.mark.skipif(real_data() is None, reason="FEDMED_DATA names no folder with cxr/dev and seg2d/dev")
def test_the_real_data_make_valid_manifests(tmp_path: Path):
    assert prepare.main([str(real_data()), str(tmp_path)]) == 0
    assert_whole(tmp_path, "classification", {*prepare.NIH_SITES, *COVID})
    found = assert_whole(tmp_path, "lungs", set(prepare.LUNG_HOSPITALS))
    for row in found["covid_italy"].rows:
        with Image.open(row.mask) as mask, Image.open(row.image) as image:
            assert mask.size == image.size
            assert set(np.unique(np.asarray(mask))) == {0, 255}
