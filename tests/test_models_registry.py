"""The one door: reproducible, quiet about the caller's random state, clear about what it cannot build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import MODELS, build

SMALL = ModelConfig(name="small-cnn", width=4)
OWN = """
import torch
calls = []
def network(*, in_channels, outputs, norm, width):
    calls.append((in_channels, outputs, norm, width))
    return torch.nn.Conv2d(in_channels, outputs, 1)
def nothing(**keywords):
    return None
def positional(in_channels, outputs):
    return None
def angry(**keywords):
    raise RuntimeError("first line\\nsecond line")
value = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "broken_networks.py").write_text("raise ValueError('half\\nwritten')")
    monkeypatch.syspath_prepend(tmp_path)


def test_same_seed_same_weights_whatever_the_callers_random_state() -> None:
    torch.manual_seed(1)
    first = build(SMALL, outputs=2, seed=7).state_dict()
    torch.manual_seed(2)
    second = build(SMALL, outputs=2, seed=7).state_dict()
    other = build(SMALL, outputs=2, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["block1.0.weight"], other["block1.0.weight"])


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_leaves_the_callers_random_state_alone(seed: int) -> None:
    before = torch.random.get_rng_state()
    build(SMALL, outputs=2, seed=seed)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", MODELS)
def test_builds_every_network_in_training_mode_from_its_configuration(name: str) -> None:
    network = build(ModelConfig(name=name, norm="instance", width=2, in_channels=3), outputs=5, seed=0)
    assert network.training
    assert network(torch.randn(1, 3, 64, 64)).shape[:2] == (1, 5)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize(("name", "nearest"), [("chex-net", "chexnet"), ("u-net", "unet"), ("", "chexnet")])
def test_unknown_name_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(ModelConfig(name=name), outputs=1, seed=0)
    assert "did you mean" in str(caught.value)
    assert not name or f"did you mean {nearest!r}" in str(caught.value)


def test_refuses_no_outputs() -> None:
    with pytest.raises(ModelError, match=r"task\.labels"):
        build(SMALL, outputs=0, seed=0)


@pytest.mark.usefixtures("own")
def test_builds_a_users_own_network() -> None:
    config = ModelConfig(name="own_networks:network", norm="batch", width=9, in_channels=2)
    first, second = (build(config, outputs=4, seed=3) for _ in range(2))
    assert isinstance(first, torch.nn.Conv2d)
    assert torch.equal(first.weight, second.weight)
    import own_networks

    assert own_networks.calls == [(2, 4, "batch", 9)] * 2


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:network", "cannot be imported"),
        ("broken_networks:network", "ValueError: half written"),
        ("own_networks:absent", "found nothing of that name"),
        ("own_networks:value", "found a int"),
        ("own_networks:nothing", "returned a NoneType"),
        ("own_networks:positional", "failed when called with in_channels=1"),
        ("own_networks:angry", "first line second line"),
        ("own_networks:", "expected"),
        (":network", "expected"),
        ("a:b:c", "expected"),
    ],
)
def test_own_network_that_cannot_be_built_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build(ModelConfig(name=name), outputs=1, seed=0)
    assert "\n" not in str(caught.value)
