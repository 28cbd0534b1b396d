"""Arms of a comparison: the same patients held out, the same budget, and nothing trained on who judges."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_hospitals import hospital

from fedmed import config as run_file
from fedmed.errors import ConfigError
from fedmed.experiments.arms import budget_of, comparisons, seeds_of, trials_of
from fedmed.experiments.judging import check_paired
from fedmed.experiments.pooling import pooled
from fedmed.experiments.predictions import Judged, _mark
from fedmed.experiments.reuse import digest, folder_of
from fedmed.experiments.subgroups import groups_of, untold
from fedmed.imaging.manifest import read_manifest, read_table
from fedmed.imaging.split import evaluation_rows

SITES = ("north", "south")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory):
    """A function: a run over two hospitals of small pictures; sections override keys."""
    root = tmp_path_factory.mktemp("hospitals")
    paths = [str(hospital(root / name, 12 + 8 * place, place)) for place, name in enumerate(SITES)]

    def configure(**sections: dict[str, object]):
        values: dict[str, dict[str, object]] = {
            "model": {"name": "small-cnn", "width": 4},
            "task": {"labels": ["a", "b"]},
            "data": {"sites": paths, "image-size": 16},
            "evaluate": {"site-share": 0.3, "seeds": 2},
        }
        for name, keys in sections.items():
            values[name] = {**values.get(name, {}), **keys}
        return run_file.validate(values)

    return configure


def held_out(config) -> dict[str, set[str]]:
    """The image files that each site of a configuration holds out."""
    found = {}
    for path in config.data.sites:
        manifest = read_manifest(Path(path), config.task)
        name = Path(path).parent.name
        out = evaluation_rows(manifest, config.evaluate.site_share, config.split_seed, name)
        found[name] = {str(row.image) for row, is_out in zip(manifest.rows, out, strict=True) if is_out}
    return found


def test_every_arm_and_seed_holds_out_the_same_patients(hospitals, tmp_path) -> None:
    trials = trials_of(hospitals(), tmp_path)
    expected = held_out(hospitals())
    assert all(len(images) > 0 for images in expected.values())
    assert {trial.seed for trial in trials} == {7, 8}
    for trial in trials:
        assert held_out(trial.judges) == expected
        found = held_out(trial.config)
        if trial.arm == "pooled":
            assert found == {"pooled": set().union(*expected.values())}
        else:
            assert found == {name: expected[name] for name in found}


def test_pooled_training_never_trains_on_anyones_held_out_patients(hospitals, tmp_path) -> None:
    (trial, *_) = [trial for trial in trials_of(hospitals(), tmp_path) if trial.arm == "pooled"]
    with Path(trial.config.data.sites[0]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    out = set().union(*held_out(hospitals()).values())
    assert len(rows) == 2 * (12 + 20)
    assert {row["image"] for row in rows if row["split"] == "test"} == out
    assert {row["patient_id"] for row in rows if row["split"] == "train"}.isdisjoint(
        row["patient_id"] for row in rows if row["split"] == "test"
    )
    assert {row["patient_id"].partition("/")[0] for row in rows} == set(SITES), "p1 here is not p1 there"


@given(st.integers(1, 2**31))
def test_another_seed_with_the_same_split_seed_moves_nobody(hospitals, seed: int) -> None:
    base = hospitals(evaluate={"split-seed": 5})
    assert held_out(base.model_copy(update={"seed": seed})) == held_out(base)
    assert base.split_seed == 5 and hospitals().split_seed == hospitals().seed


def test_pooled_rounds_take_the_steps_of_all_sites(hospitals, tmp_path) -> None:
    config = hospitals(train={"local-steps": 3}, strategy={"min-sites": 2, "name": "fedavgm"})
    by_arm = {trial.arm: trial.config for trial in trials_of(config, tmp_path)}
    assert by_arm["pooled"].train.local_steps == 6
    assert by_arm["local"].train.local_steps == by_arm["federated"].train.local_steps == 3
    assert {arm: found.strategy.name for arm, found in by_arm.items()} == {
        "local": "fedavg",
        "federated": "fedavgm",
        "pooled": "fedavg",
    }
    assert by_arm["local"].strategy.min_sites == by_arm["pooled"].strategy.min_sites == 1
    assert len({found.train.batch_size for found in by_arm.values()}) == 1


@pytest.mark.parametrize("section", ["train", "evaluate"])
def test_early_stopping_gives_no_arm_another_budget(hospitals, tmp_path, section: str) -> None:
    config = hospitals(**{section: {"patience": 2}})
    with pytest.raises(ConfigError, match=f"{section}.patience ends each training"):
        trials_of(config, tmp_path)
    for arms in (["fedavg", "fedavgm"], ["pooled"]):
        evaluate = {"evaluate": {**run_file.nested(config)["evaluate"], "compare": arms}}
        fair = run_file.validate({**run_file.nested(config), **evaluate})
        assert trials_of(fair, tmp_path)
        assert f"{section}.patience may end a training before" in budget_of(fair)


def test_two_manifests_with_one_image_cannot_be_pooled_unseen(hospitals, tmp_path) -> None:
    twin = tmp_path / "twin" / "manifest.csv"
    original = Path(hospitals().data.sites[0])
    twin.parent.mkdir()
    twin.write_text(original.read_text().replace(",", f",{original.parent}/", 1).replace("patient_id,", "patient_id,"))
    text = [line.split(",") for line in original.read_text().splitlines()]
    lines = [text[0]] + [[p, str(original.parent / image), *rest] for p, image, *rest in text[1:]]
    twin.write_text("\n".join(map(",".join, lines)))
    config = hospitals(data={"sites": [str(original), str(twin)]})
    (trial, *_) = [trial for trial in trials_of(config, tmp_path) if trial.arm == "pooled"]
    with pytest.raises(Exception, match="name the same image"):
        read_manifest(Path(trial.config.data.sites[0]), config.task)


def test_own_data_sets_are_pooled_by_their_own_function(toy_config, tmp_path) -> None:
    config = toy_config(str(tmp_path / "a-40"), str(tmp_path / "b-20"), server=str(tmp_path / "s-30"))
    (trial, *_) = [trial for trial in trials_of(config, tmp_path) if trial.arm == "pooled"]
    data = pooled(Path(trial.config.data.sites[0]), trial.config)
    assert len(data) == 60 and data.evaluation.sum() == 12
    assert len(set(data.patients)) == 30
    server = pooled(Path(trial.config.data.server), trial.config)
    assert len(server) == 30 and not any(patient.startswith("0/") for patient in server.patients)


@pytest.mark.parametrize("family", [["federated"], ["federated vs nobody"], ["local vs local"]])
def test_refuses_a_comparison_that_is_none(hospitals, family: list[str]) -> None:
    with pytest.raises(ConfigError, match="ARM vs ARM"):
        comparisons(hospitals(evaluate={"family": family}))


def test_refuses_an_arm_named_twice(hospitals, tmp_path) -> None:
    with pytest.raises(ConfigError, match="once"):
        trials_of(hospitals(evaluate={"compare": ["local", "local"]}), tmp_path)


@pytest.mark.parametrize(
    ("strategy", "compare"), [({"fraction": 0.5}, []), ({"name": "cyclic"}, []), ({}, ["pooled", "cyclic"])]
)
def test_refuses_arms_that_rest_beside_arms_that_do_not(hospitals, tmp_path, strategy, compare) -> None:
    with pytest.raises(ConfigError, match=r"rest in a round, so .*pooled would train on more images"):
        trials_of(hospitals(strategy=strategy, evaluate={"compare": compare}), tmp_path)
    alone = hospitals(strategy={"fraction": 0.5}, evaluate={"compare": ["fedavg", "fedavgm"]})
    assert {trial.config.strategy.fraction for trial in trials_of(alone, tmp_path)} == {0.5}


def test_budget_is_of_images_by_epoch_and_of_steps_by_step(hospitals) -> None:
    epochs, steps = budget_of(hospitals()), budget_of(hospitals(train={"local-steps": 3}))
    assert "every training image" in epochs and "equally many steps" in steps and "image" not in steps
    assert "cyclic lets sites rest" in budget_of(hospitals(evaluate={"compare": ["fedavg", "cyclic"]}))


@pytest.mark.parametrize(
    ("patients", "hidden"),
    [
        ({"F": 8, "M": 19}, "FM"),
        ({"F": 12, "M": 19}, ""),
        ({"a": 30, "b": 3, "c": 11}, "bc"),
        ({"a": 30, "b": 6, "c": 5, "d": 12}, "bc"),
        ({"a": 30, "b": 2, "c": 3, "d": 12}, "bcd"),
        ({"a": 4, "b": 5}, "ab"),
    ],
)
def test_no_small_group_follows_by_subtraction(patients: dict[str, int], hidden: str) -> None:
    assert untold(patients) == set(hidden)


def test_family_is_federated_against_pooled_and_local_unless_declared(hospitals) -> None:
    arms = ["fedavg", "local", "fedavgm", "pooled"]
    assert comparisons(hospitals(evaluate={"compare": arms})) == (
        ("fedavg", "pooled"),
        ("fedavg", "local"),
        ("fedavgm", "pooled"),
        ("fedavgm", "local"),
    )
    declared = hospitals(evaluate={"compare": arms, "family": ["fedavgm vs fedavg"]})
    assert comparisons(declared) == (("fedavgm", "fedavg"),)
    assert seeds_of(hospitals(evaluate={"seeds": 3})) == (7, 8, 9)


def test_runs_are_known_by_what_they_train(hospitals, tmp_path) -> None:
    config = hospitals()
    same = config.model_copy(update={"name": "other"})
    fewer = config.model_copy(update={"simulation": config.simulation.model_copy(update={"workers": 1})})
    assert digest(config) == digest(same) == digest(fewer)
    assert digest(config) != digest(hospitals(train={"rounds": 9}))
    manifest = hospital(tmp_path / "east", 4, 1)
    east = hospitals(data={"sites": [str(manifest)]})
    before = digest(east)
    manifest.write_text(manifest.read_text().replace(",F,", ",M,"))
    assert digest(east) != before, "another manifest of the same name is other data"
    policy = tmp_path / "site.toml"
    marks = set()
    for text in ("a = 1", "a = 2"):
        policy.write_text(text)
        marks.add(digest(hospitals(simulation={"policy": str(policy)})))
    assert len(marks) == 2, "another policy of the same name is another one"
    (trial, *_) = trials_of(config, tmp_path)
    (tmp_path / f"called-otherwise-{digest(trial.config)}").mkdir()
    assert folder_of(trial, tmp_path).name.startswith("called-otherwise")


def test_runs_and_predictions_of_other_code_are_made_anew(hospitals, monkeypatch) -> None:
    before = digest(hospitals()), _mark(hospitals(), False)
    assert before == (digest(hospitals()), _mark(hospitals(), False))
    for module in ("reuse", "predictions"):
        monkeypatch.setattr(f"fedmed.experiments.{module}.package_hash", lambda: "of other code")
    assert digest(hospitals()) != before[0] and _mark(hospitals(), False) != before[1]


def test_refuses_to_compare_networks_judged_on_other_patients() -> None:
    one = Judged(row=np.arange(3), patient=np.array([0, 0, 1]), scores={})
    other = Judged(row=np.arange(1, 4), patient=np.array([0, 0, 1]), scores={})
    check_paired({("a", 1): {"x": one}, ("b", 1): {"x": one}})
    for wrong in ({"x": other}, {"y": one}, {}):
        with pytest.raises(Exception, match="split_seed"):
            check_paired({("a", 1): {"x": one}, ("b", 1): wrong})


def test_subgroups_come_from_the_columns_of_the_manifest(tmp_path) -> None:
    manifest = hospital(tmp_path / "site", 20, 0, header="Patient_ID,image,a,b,Sex,AGE")
    groups = groups_of(manifest, np.array([2, 3, 4, 41]))
    assert {column: {group: keep.tolist() for group, keep in found.items()} for column, found in groups.items()} == {
        "sex": {"F": [True, True, False, False], "M": [False, False, True, True]},
        "age": {"18 to 39": [True, True, True, False], "40 to 59": [False, False, False, True]},
    }
    assert groups_of(tmp_path / "no-manifest", np.array([1])) == {}
    (tmp_path / "plain.csv").write_text("patient_id,image\np,x.png\n")
    assert groups_of(tmp_path / "plain.csv", np.array([2])) == {}


@pytest.mark.parametrize(("first", "sign"), [("", ","), ("", ";"), ("", "\t"), ("sep=;\n", ";")])
def test_subgroups_are_read_as_the_manifest_is(tmp_path, first: str, sign: str) -> None:
    lines = ["patient_id,image,sex", "a,1,F", "b,2,M"]
    (tmp_path / "m.csv").write_text(first + "\n".join(lines).replace(",", sign))
    rows = [number for number, _ in read_table(tmp_path / "m.csv")[1]]
    found = groups_of(tmp_path / "m.csv", np.array(rows))["sex"]
    assert {group: keep.tolist() for group, keep in found.items()} == {"F": [True, False], "M": [False, True]}


def test_ages_in_words_of_dicom_are_understood(tmp_path) -> None:
    (tmp_path / "m.csv").write_text("patient_id,image,age\na,1,063Y\nb,2,017Y\nc,3,\nd,4,8M\n")
    found = groups_of(tmp_path / "m.csv", np.array([2, 3, 4, 5]))["age"]
    assert {group: keep.tolist() for group, keep in found.items()} == {
        "under 18": [False, True, False, False],
        "60 to 79": [True, False, False, False],
    }


def test_sources_of_pooled_data_name_nothing_but_data(toy_config, tmp_path) -> None:
    config = toy_config(str(tmp_path / "a-40"), str(tmp_path / "b-20"))
    (trial, *_) = [trial for trial in trials_of(config, tmp_path) if trial.arm == "pooled"]
    sources = json.loads((Path(trial.config.data.sites[0]) / "sources.json").read_text())
    assert sources == {"dataset": "toy:dataset", "sites": list(config.data.sites), "files": {}}


def test_corrected_files_of_own_data_are_pooled_anew(toy_config, tmp_path) -> None:
    paths = [tmp_path / name / "labels.csv" for name in "ab"]
    config = toy_config(*map(str, paths))
    marks = []
    for labels in ("1,0", "1,1"):
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.write_text(labels)
        marks.append({trial.arm: digest(trial.config) for trial in trials_of(config, tmp_path)})
    assert all(marks[0][arm] != marks[1][arm] for arm in ("local", "federated", "pooled"))


def test_resplit_gives_every_seed_its_own_held_out_patients(hospitals, tmp_path) -> None:
    trials = trials_of(hospitals(evaluate={"resplit": True}), tmp_path)
    by_seed = {seed: held_out(next(t.judges for t in trials if t.seed == seed)) for seed in (7, 8)}
    assert by_seed[7] != by_seed[8]
    for trial in trials:
        out = set().union(*held_out(trial.config).values())
        everyone = set().union(*by_seed[trial.seed].values())
        assert out == everyone if trial.arm != "local" else out <= everyone
