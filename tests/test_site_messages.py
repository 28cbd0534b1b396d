"""What a server can make a real site do or say: nothing but what its message is for, and no more than it may know."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from private_sites import site_in, task_of
from small_hospitals import hospital

from fedmed.errors import ConfigError, DataError, ModelError, UpdateRefused
from fedmed.federated.client_app import public_reason
from fedmed.federated.wire import decode_task, encode_task
from fedmed.training.site import settings_from, site_data
from fedmed.training.site_round import evaluate_round, train_round

PRIVATE = {"mode": "dp-sgd", "epsilon": 3.0, "noise-multiplier": 1.66}


@pytest.fixture
def config(toy_config):
    return toy_config("a-400", privacy=PRIVATE, train={"rounds": 3, "batch-size": 32})


def test_a_task_is_done_only_by_the_function_that_its_policy_is_asked_about(config, tmp_path):
    site = site_in(tmp_path, "[policy]\npaused = true\n")
    for kind, act in (("evaluate", train_round), ("train", evaluate_round)):
        with pytest.raises(ConfigError, match="by a task of the kind"):
            act(task_of(config, kind, 1), site)
    with pytest.raises(UpdateRefused, match="no task"):
        decode_task(encode_task(task_of(config, "card", 1)))


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
