"""What a server can make a real site do or say: nothing but what its message is for, and no more than it may know."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image
from private_sites import site_in, task_of
from real_consortium import make_site
from small_hospitals import hospital, lungs
from toy import PLANTED

from fedmed.errors import ConfigError, DataError, ModelError, UnfitRow
from fedmed.federated import client_app
from fedmed.federated.admission import privacy_in
from fedmed.federated.client_app import public_reason
from fedmed.federated.sites import site_at
from fedmed.federated.wire import decode_task, encode_task
from fedmed.training import site_round
from fedmed.training.discretion import UNFORESEEN
from fedmed.training.own_patients import OwnPatients
from fedmed.training.site import Site, settings_from, site_data
from fedmed.training.site_round import evaluate_round, site_card, train_round
from fedmed.types import Update

PRIVATE = {"mode": "dp-sgd", "epsilon": 3.0, "noise-multiplier": 1.66}


@pytest.fixture
def config(toy_config):
    return toy_config("a-400", privacy=PRIVATE, train={"rounds": 3, "batch-size": 32})


def test_a_task_is_done_only_by_the_function_that_its_policy_is_asked_about(config, tmp_path):
    site = site_in(tmp_path, "[policy]\npaused = true\n")
    for kind, act in (("evaluate", train_round), ("train", evaluate_round)):
        with pytest.raises(ConfigError, match="by a task of the kind"):
            act(task_of(config, kind, 1), site)
    with pytest.raises(ConfigError, match="no task") as raised:
        decode_task(encode_task(task_of(config, "card", 1)))
    assert public_reason(raised.value) == "the server's message is of another fedmed version"


@pytest.fixture
def asked(monkeypatch):
    """A function: what the app at a folder's site.toml answers."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def ask(kind: str, folder: Path, content: RecordDict) -> Message:
        message = Message(deepcopy(content), 2, "query.hello" if kind == "hello" else kind, group_id="1")
        context = Context(1, 2, {"site": str(folder / "site.toml")}, RecordDict(), {})
        return getattr(client_app, kind)(message, context)

    return ask


@pytest.mark.parametrize("kind", ["train", "evaluate", "hello"])
def test_what_a_server_is_not_told_stands_in_the_site_s_own_log(kind, asked, toy_config, tmp_path, capsys):
    content = encode_task(task_of(toy_config("a-40"), "train" if kind == "hello" else kind, 1))
    for name in ("broken-40", "bug-40"):
        reply = asked(kind, make_site(tmp_path, name), content)
        reason = reply.content["card"]["problem"] if kind == "hello" else reply.error.reason
        log = capsys.readouterr().err
        assert PLANTED not in reason and log.startswith("the task failed: "), reason
        assert f"{PLANTED}: cannot be read" in log if name == "broken-40" else "ZeroDivisionError" in log
        assert log.count("\n") == 1 and (name == "broken-40" or PLANTED not in log)


def test_a_site_says_its_version_even_if_it_cannot_read_the_question(asked, tmp_path):
    reply = asked("hello", make_site(tmp_path, "a-40"), RecordDict({"task": ConfigRecord({"json": "{}"})}))
    card = reply.content["card"]
    assert card["code"] and card["problem"] == "the server's message is of another fedmed version"


def test_a_site_says_that_networks_differ_only_where_they_do(toy_config, tmp_path):
    task = task_of(toy_config("a-40"), "train", 1)
    site = site_in(tmp_path, "[policy]\n")
    with pytest.raises(ModelError) as raised:
        train_round(replace(task, layout="0" * 64), site)
    assert public_reason(raised.value) == "the site built another network than the server"
    assert "another network" not in public_reason(ModelError("chexnet needs larger images"))


@pytest.mark.parametrize("key", ["model.weights", "data.sites", "data.server", "data.dataset"])
def test_a_task_that_names_a_file_is_refused(key, config):
    values = json.loads(task_of(config, "train", 1).settings)
    section, name = key.split(".")
    values[section][name] = ["/etc/hostname"] if name == "sites" else "/etc/hostname"
    with pytest.raises(ConfigError, match=r"site\.toml"):
        settings_from(json.dumps(values))


def test_p01_under_privacy_a_server_is_not_told_which_images_are_wrong(toy_config, tmp_path):
    manifest = hospital(tmp_path / "data", 6, seed=1)
    text = manifest.read_text()
    next(iter(sorted((tmp_path / "data").rglob("*.png")))).write_bytes(b"no image")
    for mode in ("none", "dp-sgd"):
        config = toy_config("a-400", privacy={**PRIVATE, "mode": mode}, data={"image-size": 8, "max-unreadable": 0.0})
        site = site_in(tmp_path / mode, "[policy]\n", manifest=manifest, dataset="", virtual=False)
        settings = task_of(config, "train", 1).settings
        manifest.write_text(text)
        if mode == "none":
            with pytest.raises(DataError, match="cannot be read") as raised:
                site_data(site, settings)
            assert "row" in public_reason(raised.value)
            continue
        assert len(site_data(site, settings).unreadable) == 1, "the server's limit would be a question about an image"
        manifest.write_text(text + "p1,gone.png\n")
        site_data.cache_clear()
        with pytest.raises(DataError, match="row") as raised:
            site_data(site, settings)
        assert public_reason(raised.value) == "the site's data cannot be used for this task"


@pytest.mark.parametrize(("unit", "metrics"), [("patient", 0.0), ("patient", 1.0), ("image", 0.0)])
def test_p01_a_private_run_counts_the_patients_of_the_manifest_whatever_its_settings_can_read(
    unit, metrics, toy_config, tmp_path
):
    manifest = hospital(tmp_path / "data", 40, seed=1)
    manifest.write_text(manifest.read_text().replace(",20\n", ",1\n"))
    rules = f'[policy.privacy]\nepsilon = 900.0\nunit = "{unit}"\n'
    site = site_in(tmp_path / "site", rules, manifest=manifest, dataset="", virtual=False)
    found = {}
    for labels in (("a", "b"), ("a", "age"), ("sex", "age")):  # all rows fit the task, one by its age, and none
        privacy = {**PRIVATE, "epsilon": 8.0, "metrics-epsilon": metrics, "unit": unit, "images-per-patient": 4}
        config = toy_config("a-400", privacy=privacy, data={"image-size": 8}, task={"labels": labels})
        data = site_data(site, task_of(config, "card", 0).settings)
        card = site_card(task_of(config, "card", 0), site)
        trained = train_round(task_of(config, "train", 1), site)
        judged = evaluate_round(task_of(config, "evaluate", 1), site)
        found[len(data)] = [card, _public(trained), _public(judged)]
    assert sorted(found) == [0, 1, 80]
    assert found[0] == found[1] == found[80]
    card, trained, judged = found[80]
    assert card["patients"] == card["images"] == 40 == trained["examples"] + judged["examples"]


def test_p01_one_row_makes_no_private_run_fail(toy_config, tmp_path):
    manifest = lungs(tmp_path / "data", 8, seed=1)
    text = manifest.read_text()
    masks = sorted((tmp_path / "data").glob("*-mask.png"))
    for place, mask in enumerate(masks):  # the first of three classes, the others of one
        Image.fromarray(np.full((16, 16), 1 if place else 3, np.uint8)).save(mask)
    manifest.write_text(text.replace(f",{masks[1].name}", ","))
    keys = {"data": {"image-size": 16}, "task": {"kind": "segmentation", "labels": ("x", "y")}}
    for cache in (None, tmp_path / "cache"):
        for mode in ("dp-sgd", "none"):
            config = toy_config("a-400", privacy={"mode": mode}, **keys)
            site = site_in(tmp_path / mode, "[policy]\n", manifest=manifest, dataset="", virtual=False, cache_dir=cache)
            settings = task_of(config, "train", 1).settings
            if mode == "none":
                with pytest.raises(UnfitRow, match="row 3 has no mask"):
                    site_data(site, settings)
                continue
            data = site_data(site, settings)
            assert data.unreadable == (2, 3) and "the row has no mask" in data.reasons
            assert (len(data), sum(data.people(named=False)), sum(data.people(named=True))) == (6, 6, 8)
    manifest.write_text(text)
    with pytest.raises(UnfitRow, match="the mask holds 3"):  # nothing of the private run's leniency was kept
        site_data(replace(site, cache_dir=tmp_path / "cache"), settings)


def test_p01_a_private_run_gives_one_reason_for_memory_and_for_defects(config, toy_config, tmp_path, monkeypatch):
    def fails(error: Exception):
        def raises(*arguments: object, **keys: object) -> None:
            raise error

        return raises

    site, said = site_in(tmp_path, "[policy.privacy]\nrequired = false\n", virtual=False), set()
    for error in (MemoryError(), RuntimeError("can't allocate memory"), ZeroDivisionError()):
        monkeypatch.setattr(OwnPatients, "train_", fails(error))
        with pytest.raises(DataError) as raised:
            train_round(task_of(config, "train", 1), site)
        said.add(public_reason(raised.value))
        with pytest.raises(type(error)):
            train_round(task_of(toy_config("a-400"), "train", 1), site)
    assert said == {UNFORESEEN}
    monkeypatch.setattr(site_round, "write_findings", fails(MemoryError()))  # un-noised, and for the hospital alone
    assert evaluate_round(task_of(config, "evaluate", 1), site).num_examples == 40


def _public(answer: Update) -> dict:
    """What a server sees, but for noise, times, what others spent before, and the records' head."""
    sums = {name: values.size for name, values in answer.metrics.items()}
    facts = {key: answer.facts.get(key) for key in ("patients", "steps")}
    return {"examples": answer.num_examples, "metrics": sums, **facts, "events": privacy_in(answer.facts)["events"]}


def test_p01_who_is_held_out_at_a_real_site_follows_from_nothing_that_a_server_knows(toy_config, tmp_path):
    manifest = hospital(tmp_path / "data", 40, seed=1)
    config = toy_config("a-400", data={"image-size": 8}, evaluate={"site-share": 0.5})
    settings = task_of(config, "train", 1).settings

    def held(folder: str, *, virtual: bool) -> set[str]:
        site = site_in(tmp_path / folder, "[policy]\n", manifest=Path(manifest), dataset="", virtual=virtual)
        data = site_data(site, settings)
        return {patient for patient, out in zip(data.patients, data.evaluation, strict=True) if out}

    assert held("a", virtual=False) != held("b", virtual=False), "their keys differ"
    assert held("a", virtual=False) == held("a", virtual=False)
    assert held("a", virtual=True) == held("b", virtual=True), "a simulation repeats itself"


def test_p07_at_a_real_site_nobody_is_put_on_a_side_to_fill_it(toy_config, tmp_path):
    manifest = hospital(tmp_path / "data", 6, seed=1)
    for mode, empty in (("dp-sgd", True), ("none", False)):
        config = toy_config(
            "a-400", privacy={"mode": mode}, data={"image-size": 8}, evaluate={"site-share": 1 - 2**-40}
        )
        site = site_in(tmp_path / mode, "[policy]\n", manifest=manifest, dataset="", virtual=False)
        assert bool(site_data(site, task_of(config, "train", 1).settings).evaluation.all()) == empty
        if empty:
            with pytest.raises(DataError, match="see fedmed data check") as raised:
                train_round(task_of(config, "train", 1), site)
            assert raised.value.public == str(raised.value)


@pytest.mark.parametrize("form", ["histogram", "exact"])
def test_without_a_policy_a_real_site_sends_nothing_of_fewer_than_ten_patients(form, toy_config, tmp_path):
    task = task_of(toy_config("a-400"), "evaluate", 1)
    for held_out in (9, 10, 40):
        path = tmp_path / f"{held_out}.toml"
        path.write_text(f'name = "a"\nmanifest = "a-{held_out * 10}"\ndataset = "toy:dataset"\nmetrics = "{form}"\n')
        site = replace(site_at(path), networks=None)
        told, simulated = (evaluate_round(task, s).metrics for s in (site, replace(site, virtual=True, min_held_out=0)))
        data = site_data(site, task.settings)
        rows = np.flatnonzero(data.evaluation)
        ids, labels = np.array(data.patients)[rows], data.targets[rows]
        smallest = min(len(set(ids[labels[:, k] == value])) for k in range(2) for value in (0, 1))
        assert len(set(ids)) == held_out and (smallest >= 10) == (held_out == 40)
        assert any(np.any(values) for values in simulated.values())
        if held_out == 9:
            assert not told
        elif held_out == 10:
            sums = [told[name] for name in ("loss", "known", "positives", "negatives", "scores") if name in told]
            assert not any(map(np.any, sums)), "too few have a label, or have it not"
        else:
            assert told.keys() == simulated.keys()
            for name, values in told.items():  # scores come in random order
                ordered = np.sort if form == "exact" else np.asarray
                np.testing.assert_array_equal(ordered(values), ordered(simulated[name]))


def test_without_a_policy_a_real_site_with_few_held_out_tells_no_loss_of_them(toy_config):
    site = Site(name="a", manifest=Path("a-90"), dataset="toy:dataset", min_held_out=10)
    with pytest.raises(ConfigError, match="lets no metric leave"):
        train_round(task_of(toy_config("a-400", strategy={"name": "feddg-ga"}), "train", 1), site)
    assert evaluate_round(task_of(toy_config("a-400"), "evaluate", 1), replace(site, min_held_out=0)).metrics


@pytest.mark.parametrize(
    ("damaged", "virtual", "told"),
    [
        ((0, 0), False, (0, "")),
        ((3, 0), False, ("", "truncated: < 10")),
        ((10, 9), False, ("", "truncated: 10; no image: < 10")),
        ((10, 11), False, (21, "truncated: 10; no image: 11")),
        ((3, 0), True, (3, "truncated: 3")),
    ],
)
def test_a_card_of_a_real_site_tells_no_small_count_of_unreadable_images(
    damaged, virtual, told, toy_config, monkeypatch
):
    site = Site(name="a", manifest=Path("a-40"), dataset="toy:dataset", virtual=virtual)
    task = task_of(toy_config("a-40"), "train", 1)
    reasons = {reason: count for reason, count in zip(("truncated", "no image"), damaged, strict=True) if count}
    data = replace(site_data(site, task.settings), unreadable=tuple(range(sum(damaged))), reasons=reasons)
    monkeypatch.setattr(site_round, "site_data", lambda *_: data)
    card = site_card(task, site)
    assert (card["unreadable"], card["reasons"]) == told
    assert (card["patients"], card["images"]) == (20, 40), "weights need them"


def test_what_is_told_is_the_whole_message():
    told = UnfitRow.told("the mask is 3 × 3 pixels, its image 4 × 4 pixels")
    assert type(told) is UnfitRow and told.public == str(told) != UnfitRow("a path").public
