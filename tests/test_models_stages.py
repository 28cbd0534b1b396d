"""Fine-tuning: what is frozen never moves, and the rest moves at its own rate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import MODELS, build, build_with_report, freeze_, parameter_groups, stages

STAGES = {
    "chexnet": ["stem", "block1", "block2", "block3", "block4", "head"],
    "resnet50": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "vgg16": ["block1", "block2", "block3", "block4", "block5", "dense", "head"],
    "small-cnn": ["block1", "block2", "block3", "block4", "classifier"],
}


def network_of(name: str, norm: str = "batch") -> nn.Module:
    dimensions = 3 if name == "cnn-lstm" else 2
    return build(ModelConfig(name=name, norm=norm, width=2), outputs=2, seed=5, dimensions=dimensions)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_stage_and_the_head_is_last(name: str) -> None:
    network = network_of(name)
    found = stages(network)
    names = [parameter for stage in found for parameter in stage.parameters]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    head = dict(network.named_parameters())[found[-1].parameters[-1]]
    assert head.shape == (2,)  # the bias of the last layer
    assert name not in STAGES or [stage.name for stage in found] == STAGES[name]


@pytest.mark.parametrize("name", ["unet", "attention-unet"])
def test_heads_of_deep_supervision_are_one_head_with_the_classifier(name: str, tmp_path: Path) -> None:
    config = ModelConfig(name=name, width=2, deep_supervision=True)
    network = build(config, outputs=2, seed=5)
    head = [f"{head}.{part}" for head in ("classifier", "coarser.0", "coarser.1") for part in ("weight", "bias")]
    assert sorted(stages(network)[-1].parameters) == sorted(head)
    low_rank = build(config.model_copy(update={"low_rank": 1}), outputs=2, seed=5)
    assert all(low_rank.get_parameter(key).requires_grad for key in head)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    given = config.model_copy(update={"weights": str(tmp_path / "weights.pth")})
    built = build_with_report(given, outputs=3, seed=5)
    assert built.loaded is not None and sorted(built.loaded.fresh) == sorted(head)
    with pytest.raises(ModelError, match=r"model\.deep-supervision"):
        build(config.model_copy(update={"fusion": "late", "modalities": 2, "in_channels": 2}), outputs=2, seed=5)


@pytest.mark.parametrize(("name", "up_to"), [("chexnet", "block2"), ("resnet50", "layer3"), ("vgg16", "block5")])
def test_frozen_stages_keep_parameters_and_statistics_while_the_rest_trains(name: str, up_to: str) -> None:
    network = network_of(name)
    frozen = freeze_(network, up_to)
    assert frozen and all(not network.get_parameter(key).requires_grad for key in frozen)
    network.train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(network, learning_rate=0.1, decay=0.5), weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(4, 1, 64, 64)).square().sum().backward()
        optimizer.step()
    begin = tuple(prefix for stage in stages(network) for prefix in stage.prefixes if stage.parameters[0] in frozen)
    moved = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert not [key for key in moved if key.startswith(begin)]
    assert {key for key in before if not key.startswith(begin)} == moved


def test_a_network_frozen_up_to_its_head_looks_at_one_image_at_a_time() -> None:
    network = network_of("resnet50").double()
    freeze_(network, "layer4")
    network.train()
    images = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_names_the_stages_that_there_are() -> None:
    for wrong in ("layer5", "head", ""):
        with pytest.raises(ModelError, match="frozen up to stem, layer1, layer2, layer3, layer4"):
            freeze_(network_of("resnet50"), wrong)


@given(st.floats(0.01, 1), st.floats(1e-6, 1))
def test_rates_grow_by_the_decay_from_stage_to_stage(decay: float, rate: float) -> None:
    with torch.device("meta"):
        network = MODELS["small-cnn"](width=1, in_channels=1, outputs=1, norm="group")
    groups = parameter_groups(network, learning_rate=rate, decay=decay)
    assert [group["name"] for group in groups] == STAGES["small-cnn"]
    assert groups[-1]["lr"] == rate
    for slower, faster in pairwise(groups):
        assert slower["lr"] == pytest.approx(decay * faster["lr"])
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.1, float("nan")])
def test_refuses_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ModelError, match="decay"):
        parameter_groups(network_of("small-cnn"), learning_rate=1.0, decay=decay)


def test_refuses_to_train_nothing() -> None:
    network = network_of("small-cnn").requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to train"):
        parameter_groups(network, learning_rate=1.0)
