"""The studies of simulations/ that compare: nobody is in two places, and what they declare holds."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from test_simulation_real_cxr import masked_xrays, xrays

from fedmed import config as run_file
from fedmed.experiments.arms import comparisons
from fedmed.experiments.sweep import points_of
from fedmed.imaging.manifest import read_manifest

STUDIES = Path(__file__).parent.parent / "simulations"


def script(study: str, name: str) -> ModuleType:
    """A module of a study, under a name that no other study has."""
    path = STUDIES / study / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"study_{study.replace('-', '_')}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def heart() -> ModuleType:
    return script("heart-disease", "heart")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Thirty patients of each of two hospitals, of which every tenth has no blood pressure."""
    rng = np.random.default_rng(0)
    path = tmp_path / "table.csv"
    numbers = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak", "cp", "restecg", "target")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("hospital", "row", *numbers))
        writer.writeheader()
        for hospital, age in (("north", 50), ("south", 70)):
            for row in range(30):
                values = {name: int(rng.integers(2)) for name in numbers} | {"age": age}
                values["trestbps"] = "" if row % 10 == 0 else 130
                writer.writerow({"hospital": hospital, "row": row, **values})
    return path


def settings(seed: int):
    return run_file.validate(
        {
            "task": {"labels": ["disease"]},
            "evaluate": {"site-share": 0.34, "split-seed": seed},
            "data": {"sites": ["x"]},
        }
    )


def test_tuning_never_sees_who_judges_under_the_same_seed(heart, table) -> None:
    for seed, hospital in itertools.product((1, 2, 3), ("north", "south")):
        whole = heart.dataset(table / hospital, settings(seed))
        tuning = heart.dataset(table / "tune" / hospital, settings(seed))
        held = {patient for patient, out in zip(whole.patients, whole.evaluation, strict=True) if out}
        assert held and not held & set(tuning.patients)
        assert set(tuning.patients) == set(whole.patients) - held
        assert 0 < tuning.evaluation.sum() < len(tuning)
        assert len(whole) == 27, "without those of whom a value is missing"


def test_hospitals_keep_what_tells_them_apart(heart, table) -> None:
    north, south = (
        heart.dataset(table / hospital, settings(1)).batch(np.arange(27))[0] for hospital in ("north", "south")
    )
    age = heart.NUMBERS.index("age")
    assert np.allclose(north[:, 0, 0, age], -0.5) and np.allclose(south[:, 0, 0, age], 1.5)
    assert north.shape == (27, 1, 1, heart.FEATURES)
    assert set(np.unique(north[:, 0, 0, heart.NUMBERS.index("sex")])) == {-1, 1}


def test_the_declared_arms_are_those_that_are_tuned_and_judged() -> None:
    run = script("heart-disease", "run")
    config = run_file.load(STUDIES / "heart-disease" / "heart.toml")
    assert set(config.evaluate.compare) == {*run.FEDERATED, "local", "pooled"}
    assert {first for first, second in comparisons(config) if second == "pooled"} == set(run.FEDERATED)
    assert config.evaluate.seeds == 20 and config.evaluate.resplit


def test_an_arm_within_the_margin_is_told_apart_from_one_that_is_not() -> None:
    run = script("heart-disease", "run")
    judged = {("fedavg", "pooled"): -0.0199, ("ditto", "pooled"): -0.02, ("ditto", "local"): 1.0}
    rows = [{"first": a, "second": b, "difference": 0.0, "low": low, "high": 1.0} for (a, b), low in judged.items()]
    rows.append({"first": "fedadam", "second": "pooled", "difference": 0.0, "low": None, "high": None})
    first, second, all_ = run.verdict({"comparisons": rows}, ["ditto", "fedavg"])
    assert "`ditto`" in first and "**not above −0.02**" in first
    assert "`fedavg`" in second and "**above −0.02**" in second
    assert all_.endswith("chosen or not: fedavg.")
    found = {"value": 0.8, "low": 0.7, "high": 0.9}
    for low, met in ((-0.0199, "**above −0.02**"), (-0.02, "**not above −0.02**"), (None, "without an interval")):
        report = {
            "arms": [{"arm": "fedavg", "endpoint": found}],
            "comparisons": [{"difference": 0, "low": low, "high": 0}],
        }
        assert met in run.beside_pooled(report, run.ONE_STEP)


def test_compare_deals_nobody_to_two_hospitals(tmp_path, capsys) -> None:
    xrays(tmp_path / "data")
    masked_xrays(tmp_path / "data")
    prepare = script("compare", "prepare")
    assert prepare.main([str(tmp_path / "data"), str(tmp_path / "out")]) == 0
    for name, sites in (("classification", 9), ("nih", 4), ("lungs", 4)):
        config = run_file.load(tmp_path / "out" / name / "run.toml")
        assert len(config.data.sites) == sites and comparisons(config)
        patients = [{row.patient for row in read_manifest(Path(p), config.task).rows} for p in config.data.sites]
        assert all(patients) and sum(map(len, patients)) == len(set.union(*patients))
    nih = [line for line in capsys.readouterr().out.splitlines() if "/nih-" in line]
    assert [line.split()[1] for line in nih] == ["4"] * 8
    assert prepare.main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("place", range(3))
def test_heterogeneity_varies_what_its_tables_show(place) -> None:
    run = script("heterogeneity", "run")
    study = (run.PHANTOMS, *run.REAL)[place]
    config = run_file.load(study.run_file)
    for key, values in run.SWEEPS.values():
        points = points_of(config, [f"simulation.partition={','.join(study.partitions)}", f"{key}={','.join(values)}"])
        found = {"value": 0.5, "low": 0.4, "high": None}
        report = {
            "primary": "auroc", "seeds": [1], "intervals": "x",
            "points": [{"values": dict(point.values), "endpoint": found} for point in points],
        }  # fmt: skip
        rows = [line for line in run.text_of(report, key, study.partitions).splitlines() if line.startswith("| ")]
        assert len(rows) == 1 + len(values) and rows[-1].count("0.500 (0.400––)") == len(study.partitions)


def test_fewer_patients_are_a_part_of_more_and_the_server_keeps_all(tmp_path) -> None:
    run = script("privacy-budget", "run")
    for site in (*run.SITES, "server"):
        (tmp_path / "made" / site).mkdir(parents=True)
        rows = [f"{site}-{image // 2},{image}.dcm,0,0,1,1" for image in range(20)]
        header = "patient_id,image,nodule,cavity,reticulation,consolidation"
        (tmp_path / "made" / site / "manifest.csv").write_text("\n".join([header, *rows]))
    kept = {}
    for count in (3, 7):
        run.first_patients(tmp_path / "made", tmp_path / str(count), count)
        config = run_file.load(tmp_path / str(count) / "run.toml")
        manifests = [read_manifest(Path(path), config.task) for path in (*config.data.sites, config.data.server)]
        kept[count] = [{row.patient for row in manifest.rows} for manifest in manifests]
        assert [len(patients) for patients in kept[count]] == [count, count, 10]
        assert manifests[0].rows[0].image.resolve() == (tmp_path / "made" / "site-1" / "0.dcm").resolve()
    assert kept[3][0] < kept[7][0] and kept[3][2] == kept[7][2]


def test_the_smallest_number_of_patients_is_one_from_which_on_privacy_costs_little() -> None:
    run = script("privacy-budget", "run")

    def row(*values: float):
        arms = ("no privacy", "ε = 3", "given trunk, no privacy", "given trunk, ε = 3")
        return {arm: {"value": value, "low": value, "high": value} for arm, value in zip(arms, values, strict=True)}

    found = {100: row(0.7, 0.69, 0.8, 0.5), 1000: row(0.9, 0.8, 0.85, 0.84), 10_000: row(0.95, 0.93, 0.95, 0.94)}
    *_, scratch, _, trunk = run.phantom_table(found).splitlines()
    assert "from 10,000 patients a hospital on" in scratch, "100 patients lose little of nothing"
    assert "from 1,000 patients a hospital on" in trunk, "beside the same trunk without privacy"
