"""What a site finds for itself: its own numbers, exact, in its own folder, and in nothing that leaves."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from PIL import Image

from fedmed import config as run_file
from fedmed.federated.phantoms import make_phantoms
from fedmed.imaging.dataset import Dataset, load_dataset
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.scanners import UNKNOWN, scanner_counts, scanner_name
from fedmed.imaging.stored import Tiles
from fedmed.metrics import classification_intervals
from fedmed.models import build
from fedmed.reporting import write_report
from fedmed.training.case_pictures import KEPT, PREDICTED, SIDE, TRUE, Case, Extremes, outlined, plane
from fedmed.training.evaluate import predictions
from fedmed.training.local_findings import findings
from fedmed.training.network import FlatNetwork


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One phantom hospital's manifest, eight patients."""
    folder = tmp_path_factory.mktemp("phantoms") / "cxr"
    make_phantoms(folder, "cxr", sites=2, patients=8, seed=3)
    return folder / "site-2" / "manifest.csv"


@pytest.fixture(scope="module")
def config(hospital: Path):
    return run_file.load(hospital.parents[1] / "run.toml", ["model.name=small-cnn", "model.norm=group"])


@pytest.fixture(scope="module")
def data(hospital: Path, config) -> Dataset:
    return load_dataset(
        hospital, task=config.task, preset="cxr", image_size=32, in_channels=1, max_unreadable=0.0, site_share=0.4,
        seed=7, name="site-2", cache_dir=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def network(config) -> FlatNetwork:
    return FlatNetwork(build(config.model, outputs=4, seed=1), torch.device("cpu"))


def test_counts_prevalence_and_scanners_are_those_of_the_manifest(hospital, config, data, network) -> None:
    found = findings("site-2", hospital, config, data, network, 5)
    rows = read_manifest(hospital, config.task).rows
    assert (found["patients"], found["images"]) == (8, len(rows))
    targets = np.array([row.labels for row in rows])
    for k, label in enumerate(config.task.labels):
        assert found["prevalence"][label] == {
            "positives": int((targets[:, k] == 1).sum()),
            "negatives": int((targets[:, k] == 0).sum()),
        }
    assert found["scanners"] == [{"scanner": "fedmed phantom B (DX)", "images": len(rows)}]
    assert found["held_out"]["patients"] == len({data.patients[k] for k in np.flatnonzero(data.evaluation)})


def test_metrics_are_those_of_the_cases_themselves(hospital, config, data, network) -> None:
    found = findings("site-2", hospital, config, data, network, 5)["metrics"]
    rows = np.flatnonzero(data.evaluation)
    batches = list(predictions(network, data, rows))
    logits, targets = (np.concatenate([batch[part] for batch in batches]) for part in (1, 2))
    patients = [data.patients[row] for row in rows]
    expected = classification_intervals(logits, targets, patients, config.task.labels, 1000, np.random.default_rng(7))
    assert found["loss"]["value"] == pytest.approx(expected["loss"].value)
    assert found["loss"]["low"] == pytest.approx(expected["loss"].low)
    assert found.keys() == expected.keys()


def test_pictures_show_the_most_wrong_images_first(hospital, config, data, network) -> None:
    pictures = findings("site-2", hospital, config, data, network, 5)["pictures"]
    scores = [picture["score"] for picture in pictures if picture["kind"] == "worst"]
    assert len(scores) == KEPT and scores == sorted(scores)
    label, _, outcome = pictures[0]["outcome"].partition(": ")
    truth, _, predicted = outcome.partition(", predicted ")
    assert label in config.task.labels
    assert float(predicted) == pytest.approx(scores[0] if truth == "present" else 1 - scores[0], abs=0.006)
    kind, _, content = str(pictures[0]["image"]).partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert max(image.size) == SIDE


def test_nobody_held_out_means_no_metrics(hospital, config, data, network) -> None:
    everyone = Dataset(data.images, data.targets, data.patients, channels=data.channels)
    found = findings("site-2", None, config, everyone, network, 5)
    assert (found["metrics"], found["pictures"], found["scanners"]) == ({}, [], [])
    assert found["held_out"] == {"patients": 0, "items": 0} and json.dumps(found, allow_nan=False)


def test_scanners_of_images_that_are_no_dicom_are_left_out(tmp_path: Path, hospital, config) -> None:
    picture = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(picture)
    (tmp_path / "torn.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0")
    assert [scanner_name(tmp_path / name) for name in ("a.png", "absent.dcm", "torn.dcm")] == [None, None, UNKNOWN]
    rows = read_manifest(hospital, config.task).rows
    assert scanner_name(rows[0].image.parent) == "fedmed phantom B (DX)", "of a folder the first file speaks"
    assert sum(scanner_counts(rows * 40).values()) <= 200


def test_extremes_are_the_same_for_any_batches() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(20, 1, 6, 6)), (rng.random((20, 1, 6, 6)) < 0.4).astype(float)
    targets[3] = 0  # two empty masks agree: the best score, and nothing to look at
    scores, rows = rng.random(20), np.arange(20)
    scores[3] = 1.0
    found = []
    for size in (20, 7, 1):
        extremes = Extremes()
        for start in range(0, 20, size):
            part = slice(start, start + size)
            extremes.add(rows[part], scores[part], logits[part], targets[part])
        found.append([[case.row for case in cases] for cases in (extremes.worst, extremes.best)])
    order = [int(k) for k in np.argsort(scores)]
    assert found[0] == found[1] == found[2] == [order[:KEPT], [k for k in order[::-1] if k != 3][:KEPT]]


def test_outlines_are_drawn_where_masks_end() -> None:
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 8:24, 8:24] = True
    moved = np.roll(mask, 6, axis=2)
    picture = outlined(np.full((1, 32, 32), 0.5, np.float32), mask, moved)
    scale = SIDE // 32
    assert picture.shape == (SIDE, SIDE, 3)
    assert tuple(picture[16 * scale, 8 * scale]) == TRUE and tuple(picture[16 * scale, 14 * scale]) == PREDICTED
    assert tuple(picture[16 * scale, 20 * scale]) == (128, 128, 128), "inside, the image itself is seen"


def test_of_a_volume_the_slice_with_most_mask_is_shown() -> None:
    true = np.zeros((1, 1, 5, 8, 8))
    true[0, 0, 3, 2:6, 2:6] = 1
    extremes = Extremes()
    extremes.add(np.array([0]), np.array([0.5]), true * 2 - 1, true)
    volume = np.arange(5, dtype=np.float32)[:, None, None] / 10 * np.ones((5, 8, 8), np.float32)
    data = Dataset(volume[None, None], np.zeros((1, 1, 5, 8, 8), np.uint8), ("a",))
    (case,) = extremes.worst
    assert case.depth == 3
    assert plane(data, 0, case.depth) == pytest.approx(np.full((1, 8, 8), 0.3))
    assert [picture["kind"] for picture in extremes.pictures(data)] == ["worst"], "no case is shown twice"


def test_best_and_worst_have_no_case_in_common() -> None:
    extremes = Extremes()
    extremes.offer([Case(row=1, score=0.2)], [Case(row=1, score=0.2), Case(row=2, score=0.9)])
    data = Dataset(np.zeros((3, 1, 8, 8), np.float32), np.zeros((3, 1), np.float32), ("a", "b", "c"))
    assert [(each["kind"], each["score"]) for each in extremes.pictures(data)] == [("worst", 0.2), ("best", 0.9)]


def test_a_run_leaves_every_site_its_own_page_and_tells_nobody(simulate, toy_config) -> None:
    result, folder = simulate(toy_config("a-40", "b-60", server="server-40"))
    report = write_report(folder.path)
    evaluation = json.loads((folder.path / "evaluation.json").read_text())
    assert evaluation["counts"].keys() == set(toy.LABELS) and evaluation["thresholds"]["a"]["chosen"] is True
    for site in result["sites"]:
        own = folder.path / "sites" / site["site"]
        found = json.loads((own / "findings.json").read_text())
        assert (found["site"], found["patients"], found["images"]) == (site["site"], site["patients"], site["images"])
        assert found["metrics"]["auroc"]["n"] == found["held_out"]["patients"]
        assert (own / "findings.json").stat().st_mode & 0o077 == (own / "report.html").stat().st_mode & 0o077 == 0
        assert toy.PLANTED not in (own / "findings.json").read_text(), "a site's own page names no patient either"
        bound = site["metrics"]["auroc"]["bound"]
        exact, summed = found["metrics"]["auroc"]["value"], site["metrics"]["auroc"]["value"]
        assert abs(exact - summed) <= bound + 1e-12
        for picture in found["pictures"]:
            assert picture["image"] not in report.read_text()
    sent = "".join((folder.path / name).read_text() for name in ("events.jsonl", "result.json"))
    assert "prevalence" not in sent and "data:image" not in sent


def test_of_boxes_the_volume_that_they_were_cut_from_is_shown() -> None:
    volume = np.full((1, 6, 8, 8), 51, np.uint8)
    volume[0, 4] = 255
    tiles = Tiles.over([np.zeros((1, 6, 8, 8), np.uint8), volume], (4, 4, 4))
    data = Dataset(tiles, np.zeros((len(tiles), 1), np.float32), ("a",) * len(tiles))
    last = len(tiles) - 1
    assert plane(data, last, 4) == pytest.approx(np.ones((1, 8, 8)))
    assert plane(data, last, 0) == pytest.approx(np.full((1, 8, 8), 0.2))
    assert plane(data, 0, None).max() == 0
