"""The demo reaches its bars on phantom hospitals, and its network learns what nothing simpler can."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from fedmed import config as run_file
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.server_evaluation import load_server_data
from fedmed.federated.simulation import local_grid, run_on
from fedmed.imaging import decoding
from fedmed.imaging.dicom import grey as dicom
from fedmed.models import build
from fedmed.training.evaluate import predictions
from fedmed.training.network import FlatNetwork

pytestmark = pytest.mark.simulation


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """The hospitals of `make demo`."""
    from fedmed.federated.phantoms import PATIENTS, SEED, SITES, make_phantoms

    folder = tmp_path_factory.mktemp("demo") / "cxr"
    make_phantoms(folder, "cxr", sites=SITES, patients=PATIENTS, seed=SEED)
    return folder


@pytest.fixture(scope="module")
def demo(phantoms) -> RunFolder:
    """`make demo`, run once."""
    return train(run_file.load(phantoms / "run.toml"), phantoms.parent / "run")


@pytest.fixture(scope="module")
def short(phantoms) -> RunFolder:
    """Its first half."""
    return train(run_file.load(phantoms / "run.toml", ["train.rounds=4"]), phantoms.parent / "short")


def train(config, out: Path) -> RunFolder:
    folder = RunFolder.create(out, config)
    with local_grid(config, folder) as grid:
        run_on(grid, config, folder, lambda event: None)
    return folder


def value(folder: RunFolder, name: str = "auroc") -> float:
    return json.loads((folder.path / "result.json").read_text())["server"]["metrics"][name]["value"]


def server_auroc(folder: RunFolder) -> float:
    """Mean AUROC of a run's network on all of the server's images, decoded now."""
    config = run_file.load(folder.path / "run.toml")
    network = build(config.model, outputs=len(config.task.labels), seed=0)
    network.load_state_dict(load_file(folder.path / "model.safetensors"))
    data = load_server_data(config, cache_dir=None)
    flat = FlatNetwork(network, torch.device("cpu"))
    batches = list(predictions(flat, data, np.arange(len(data))))
    logits, targets = (np.concatenate([batch[index] for batch in batches]) for index in (1, 2))
    return float(np.mean([roc_auc_score(targets[:, k], logits[:, k]) for k in range(targets.shape[1])]))


@pytest.mark.timeout(600)
def test_half_of_the_demo_reaches_auroc_of_085_and_ends_in_a_result(short):
    assert json.loads((short.path / "result.json").read_text())["status"] == "completed"
    assert value(short) >= 0.85


@pytest.mark.timeout(600)
def test_breaking_monochrome1_costs_five_points_at_least(short, monkeypatch):
    right = server_auroc(short)
    monkeypatch.setattr(dicom, "invert", lambda values: values)
    monkeypatch.setattr(decoding, "apart", decoding.here)  # in this process, where the patch is
    assert server_auroc(short) <= right - 0.05


@pytest.mark.timeout(600)
def test_the_segmentation_demo_reaches_dice_of_085(fedmed, tmp_path):
    made = fedmed("data", "synth", tmp_path / "lungs", "--task", "lung-seg", "--patients", 40)
    assert made.returncode == 0, made.stderr
    done = fedmed("simulate", tmp_path / "lungs" / "run.toml", "--set", "train.rounds=2", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["server"]["metrics"]["dice"]["value"] >= 0.85


def test_the_same_seed_gives_the_same_hospitals(fedmed, tmp_path):
    for name in ("first", "second"):
        assert fedmed("data", "synth", tmp_path / name, "--patients", 2, "--sites", 2, "--seed", 3).returncode == 0
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


# The comparisons below train six more networks: minutes.


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_learns_the_findings_at_every_site(demo):
    result = json.loads((demo.path / "result.json").read_text())
    assert result["status"] == "completed"
    assert value(demo) >= 0.95
    assert all(site["metrics"]["auroc"]["value"] > 0.9 for site in result["sites"])


def only(config, sites: tuple[str, ...]):
    data = config.data.model_copy(update={"sites": sites})
    strategy = config.strategy.model_copy(update={"min_sites": 1})
    return config.model_copy(update={"data": data, "strategy": strategy})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_federation_beats_the_best_single_site_and_nears_pooled_training(demo, phantoms, tmp_path):
    config = run_file.load(phantoms / "run.toml")
    alone = {
        Path(site).parent.name: value(train(only(config, (site,)), tmp_path / Path(site).parent.name))
        for site in config.data.sites
    }
    pooled = tmp_path / "everyone" / "manifest.csv"
    pooled.parent.mkdir()
    rows: list[dict[str, str]] = []
    for site in map(Path, config.data.sites):
        with site.open(newline="") as file:
            rows += [{**row, "image": str(site.parent / row["image"])} for row in csv.DictReader(file)]
    with pooled.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    together = value(train(only(config, (str(pooled),)), tmp_path / "pooled"))
    print(f"federated {value(demo):.3f}, pooled {together:.3f}, alone {alone}")
    assert value(demo) > max(alone.values())
    assert value(demo) >= together - 0.02


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_with_broken_monochrome1_costs_five_points_at_least(demo, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dicom, "invert", lambda values: values)  # workers are forked from here
    monkeypatch.setattr(decoding, "apart", decoding.here)  # in this process, where the patch is
    broken = train(run_file.load(phantoms / "run.toml"), tmp_path / "broken")
    print(f"right {value(demo):.3f}, broken {value(broken):.3f}")
    assert value(broken) <= value(demo) - 0.05
