"""The network that a run kept comes back tensor by tensor, or the reason why it does not."""

import json

import pytest
import torch
from kept_runs import FINDING, kept_run, network_of
from safetensors.torch import load_file, save_file

from fedmed import config as run_file
from fedmed.errors import ConfigError, ModelError
from fedmed.training.predict.kept import load_kept


def test_the_network_is_loaded_tensor_by_tensor(tmp_path):
    path = kept_run(tmp_path / "run", {"name": "resnet50", "width": 4, "norm": "batch"}, FINDING, **{"image-size": 40})
    mine = network_of(run_file.load(path / "run.toml")).module.state_dict()
    kept = load_kept(path)
    assert kept.round == 3 and not kept.network.module.training
    found = kept.network.module.state_dict()
    assert mine.keys() == found.keys() and all(torch.equal(tensor, found[name]) for name, tensor in mine.items())


def test_a_damaged_or_foreign_network_is_refused_with_the_reason(tmp_path):
    run = kept_run(tmp_path / "run", {"name": "small-cnn", "width": 2}, FINDING, **{"image-size": 32})
    good, facts = load_file(run / "model.safetensors"), json.loads((run / "model.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises((ModelError, ConfigError), match=match):
            load_kept(run)

    save_file({**good, "classifier.bias": torch.tensor([0.0, float("nan")])}, run / "model.safetensors")
    refused("NaN")
    save_file({**good, "classifier.bias": torch.zeros(3)}, run / "model.safetensors")
    refused("another shape")
    save_file({name: tensor for name, tensor in good.items() if name != "classifier.bias"}, run / "model.safetensors")
    refused("other tensors")
    (run / "model.safetensors").write_bytes(b"damaged")
    refused("cannot be read")
    (run / "model.safetensors").unlink()
    refused("no model.safetensors")
    save_file(good, run / "model.safetensors")
    load_kept(run)
    for change, match in (
        ({"layout": "0" * 64}, "builds another network"),
        ({"schema": 2}, "schema 2"),
        ({"preprocessing": None}, "damaged"),
        ({"preprocessing": {**facts["preprocessing"], "preset": "cxx"}}, "unknown"),
        ({"preprocessing": {**facts["preprocessing"], "dataset": "own:data"}}, "function of its own"),
        ({"model": {**facts["model"], "name": "smal-cnn"}}, "small-cnn"),
    ):
        (run / "model.json").write_text(json.dumps({**facts, **change}))
        refused(match)
    (run / "model.json").write_text("{")
    refused("cannot be read")
