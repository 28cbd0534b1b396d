"""Phantom hospitals: repeatable, each its own scanner, and hard for anything but a convolutional network."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedmed import config as run_file
from fedmed.cli.data import synth
from fedmed.config import TaskConfig
from fedmed.errors import ConfigError
from fedmed.federated import phantoms as built_in
from fedmed.federated.phantoms import phantom_folder, with_phantoms
from fedmed.imaging import decoding
from fedmed.imaging.dataset import Dataset, load_dataset
from fedmed.imaging.dicom import grey as dicom
from fedmed.imaging.phantoms.dicom_object import Patient, write_object
from fedmed.imaging.phantoms.findings import FINDINGS
from fedmed.imaging.phantoms.hospitals import LABELS, radiograph, synthesize
from fedmed.imaging.phantoms.scanner import SCANNERS, Scanner
from fedmed.imaging.reading import read_image

TASK = TaskConfig(labels=LABELS)
SITES = ("site-1", "site-2", "site-3", "site-4")
Matrix = NDArray[np.float64]


def load(root: Path, name: str, task: TaskConfig = TASK) -> Dataset:
    return load_dataset(
        root / name / "manifest.csv", task=task, preset="cxr", image_size=64, in_channels=1, max_unreadable=0.0,
        site_share=0.2, seed=7, name=name, cache_dir=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cxr")
    synthesize(out, task="cxr", sites=4, patients=75, seed=7)
    return out


@pytest.fixture(scope="module")
def sets(phantoms: Path) -> dict[str, Dataset]:
    return {name: load(phantoms, name) for name in (*SITES, "server")}


def arrays(*datasets: Dataset) -> tuple[Matrix, Matrix]:
    """Images (N, S, S) and labels."""
    batches = [dataset.batch(np.arange(len(dataset))) for dataset in datasets]
    return tuple(torch.cat(part).numpy() for part in zip(*batches, strict=True))  # type: ignore[return-value]


def test_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        synthesize(tmp_path / name, task="cxr", sites=6, patients=2, seed=seed)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 30
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    other = tmp_path / "three/site-1/images/0001.dcm"
    assert not np.array_equal(read_image(tmp_path / "one/site-1/images/0001.dcm"), read_image(other))


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.model)
def test_a_correct_reader_sees_what_the_scanner_meant(tmp_path: Path, scanner: Scanner) -> None:
    rng = np.random.default_rng(5)
    body = radiograph(scanner, [True, False, True, False], rng)
    write_object(tmp_path / "x", body.picture, scanner, Patient.random(1, 0, 7, rng), 0)
    shown, meant = read_image(tmp_path / "x")[0], body.picture
    inside = slice(scanner.collimator, scanner.matrix[1] - scanner.collimator)
    if not scanner.display:  # no window: the reader stretches the range
        meant = (meant - meant[:, inside].min()) / np.ptp(meant[:, inside])
    if scanner.display == "SIGMOID":
        meant = np.clip(meant, 0.02, 0.98)
    np.testing.assert_allclose(shown[:, inside], meant[:, inside], atol=3e-3)
    assert not shown[:, : scanner.collimator].any()


def test_each_site_has_its_own_scanner_and_the_server_all(phantoms: Path) -> None:
    def dialect(path: Path) -> tuple[str, ...]:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        tags = ("PhotometricInterpretation", "BitsStored", "PixelRepresentation", "Rows", "Columns", "RescaleSlope",
                "WindowWidth", "VOILUTFunction", "ImagerPixelSpacing")  # fmt: skip
        return (str(ds.file_meta.TransferSyntaxUID), *(str(ds.get(tag)) for tag in tags), str("VOILUTSequence" in ds))

    seen = {name: {dialect(path) for path in (phantoms / name / "images").iterdir()} for name in (*SITES, "server")}
    assert all(len(seen[name]) == 1 for name in SITES)
    assert len(seen["server"]) == 4
    assert seen["server"] == set.union(*(seen[name] for name in SITES))
    assert {one[1] for name in SITES for one in seen[name]} == {"MONOCHROME1", "MONOCHROME2"}


def test_objects_are_nobodys_and_complete(phantoms: Path) -> None:
    for name in SITES:
        with (phantoms / name / "manifest.csv").open() as file:
            rows = list(csv.DictReader(file))
        ds = pydicom.dcmread(phantoms / name / rows[0]["image"])
        assert str(ds.PatientName).startswith("Phantom^")
        assert ds.PatientID == rows[0]["patient_id"]
        assert (ds.StudyInstanceUID, ds.SeriesInstanceUID) == (rows[0]["study_uid"], rows[0]["series_uid"])
        assert pydicom.uid.UID(ds.SOPInstanceUID).is_valid
        assert ds.file_meta.MediaStorageSOPInstanceUID
        assert ds.Modality in ("CR", "DX")
        assert ds.BodyPartExamined == "CHEST"
        if ds.Modality == "DX":
            inverted = ds.PhotometricInterpretation == "MONOCHROME1"
            assert ds.PresentationLUTShape == ("INVERSE" if inverted else "IDENTITY")


def test_labels_are_per_patient_and_neither_rare_nor_usual(phantoms: Path) -> None:
    patients = set()
    for name in (*SITES, "server"):
        with (phantoms / name / "manifest.csv").open() as file:
            rows = list(csv.DictReader(file))
        per_patient = {(row["patient_id"], *(row[label] for label in LABELS)) for row in rows}
        assert len(per_patient) == 75
        assert 150 <= len(rows) <= 225
        share = np.array([[int(value) for value in row[1:]] for row in per_patient]).mean(axis=0)
        assert (share >= 0.3).all()
        assert (share <= 0.6).all()
        patients |= {row["patient_id"] for row in rows}
    assert len(patients) == 5 * 75


@pytest.mark.parametrize("name", sorted(FINDINGS))
def test_a_mimic_has_the_same_energy_and_no_mean(name: str) -> None:
    y, x = np.mgrid[-20:21, -20:21].astype(np.float32)
    seeds = [(present, seed) for present in (True, False) for seed in range(9)]
    drawn = [FINDINGS[name](x, y, present, np.random.default_rng(seed)) for present, seed in seeds]
    assert max(abs(one.sum()) for one in drawn) < 1e-2
    energy = np.array([(one**2).sum() for one in drawn])
    assert energy[:9].mean() == pytest.approx(energy[9:].mean(), rel=0.02)


def thumbnails(images: Matrix) -> Matrix:
    return images.reshape(len(images), 8, 8, 8, 8).mean(axis=(2, 4)).reshape(len(images), 64)


def statistics(images: Matrix) -> Matrix:
    corners = [images[:, rows, columns].mean((1, 2)) for rows in (slice(8), slice(-8, None))
               for columns in (slice(8), slice(-8, None))]  # fmt: skip
    return np.stack([images.mean((1, 2)), images.std((1, 2)), *corners], axis=1)


@pytest.mark.parametrize("features", [thumbnails, statistics])
def test_nothing_simple_finds_the_findings(sets: dict[str, Dataset], features: Callable[[Matrix], Matrix]) -> None:
    images, labels = arrays(*(sets[name] for name in SITES))
    new_images, new_labels = arrays(sets["server"])
    scores = []
    for k in range(len(LABELS)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit(features(images[:, 0]), labels[:, k])
        scores.append(roc_auc_score(new_labels[:, k], model.predict_proba(features(new_images[:, 0]))[:, 1]))
    assert max(scores) < 0.70
    assert np.mean(scores) < 0.62


def test_the_scanner_does_not_tell_the_findings(sets: dict[str, Dataset]) -> None:
    labels = [arrays(sets[name])[1] for name in SITES]
    truth, guess = np.concatenate(labels), np.concatenate([np.tile(one.mean(0), (len(one), 1)) for one in labels])
    assert max(roc_auc_score(truth[:, k], guess[:, k]) for k in range(len(LABELS))) < 0.62


def test_sites_look_alike_once_read_and_not_if_polarity_is_ignored(
    phantoms: Path, sets: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lungs_are_darker(dataset: Dataset) -> float:
        images = arrays(dataset)[0][:, 0]
        return float(images[:, 20:40, 30:34].mean() - images[:, 20:40, 14:22].mean())

    assert all(lungs_are_darker(sets[name]) > 0.1 for name in SITES)
    monkeypatch.setattr(dicom, "invert", lambda values: values)
    monkeypatch.setattr(decoding, "apart", decoding.here)  # in this process, where the patch is
    assert lungs_are_darker(load(phantoms, "site-2")) < -0.1


def test_lung_masks_fit_and_no_threshold_finds_them(tmp_path: Path) -> None:
    synthesize(tmp_path, task="lung-seg", sites=2, patients=8, seed=1)
    lung = TaskConfig(kind="segmentation", labels=("lung",))
    images, masks = arrays(load(tmp_path, "site-1", lung), load(tmp_path, "site-2", lung))
    assert set(np.unique(masks)) == {0, 1}
    assert 0.12 < masks.mean() < 0.4
    best = max(
        2 * (masks * (inside := (images >= low) & (images <= high))).sum() / (masks.sum() + inside.sum())
        for low in np.linspace(0, 0.8, 17)
        for high in np.linspace(low, 1, 11)
    )
    assert best < 0.85


def test_progress_ends_complete_and_counts_images(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesize(tmp_path, task="cxr", sites=1, patients=3, seed=0, progress=lambda *counts: seen.append(counts))
    assert seen[-1][0] == seen[-1][1] == len(list(tmp_path.rglob("*.dcm")))
    assert all(one[0] <= one[1] for one in seen)


def test_one_patient_will_do_and_none_will_not(tmp_path: Path) -> None:
    synthesize(tmp_path, task="cxr", sites=1, patients=1, seed=0)
    assert len(load(tmp_path, "site-1")) >= 2
    with pytest.raises(ConfigError, match="patients = 0"):
        synthesize(tmp_path, task="cxr", sites=1, patients=0, seed=0)


def test_the_command_makes_the_hospitals_of_the_demo() -> None:
    given = {name: each.default for name, each in inspect.signature(synth).parameters.items()}
    assert (given["sites"], given["patients"], given["seed"]) == (built_in.SITES, built_in.PATIENTS, built_in.SEED)


def test_the_demo_gives_way_to_what_was_said_even_if_it_is_the_default(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEDMED_PHANTOMS", str(tmp_path))
    phantom_folder("cxr").mkdir(parents=True)
    config = run_file.validate(run_file.override({}, ["train.rounds=5", "model.norm=group", "data.server=own.csv"]))
    demo = with_phantoms(config, explicit=run_file.explicit_keys(config))
    assert (demo.train.rounds, demo.data.server) == (5, "own.csv")
    assert (demo.model.name, demo.model.norm, len(demo.data.sites)) == ("chexnet", "group", 4)
    assert with_phantoms(run_file.validate({})).train.rounds == 8
