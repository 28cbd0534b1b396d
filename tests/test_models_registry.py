"""The one door: reproducible, quiet about the caller's random state, clear about what it cannot build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import MODELS, build

SMALL = ModelConfig(name="small-cnn", width=4)
VOLUMES_ONLY = {"cnn-lstm"}
IMAGES_ONLY = {"chexnet", "resnet50", "vgg16"}
OWN = """
import torch
calls = []
def network(*, in_channels, outputs, norm, width):
    calls.append((in_channels, outputs, norm, width))
    return torch.nn.Conv2d(in_channels, outputs, 1)
def solid(*, in_channels, outputs, norm, width, dimensions):
    return {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dimensions](in_channels, outputs, 1)
def residual(*, in_channels, outputs, norm, width, residual=None):
    calls.append(residual)
    return torch.nn.Conv2d(in_channels, outputs, 1)
class Foreign(torch.nn.Module):
    # with the keywords of MONAI's networks, their habit of working in place, and their usual norm
    def __init__(self, spatial_dims, in_channels, out_channels, features=4):
        super().__init__()
        nn = torch.nn
        convolution, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[spatial_dims]
        self.first = convolution(in_channels, features, 3, padding=1)
        self.norm, self.act = norm(features), torch.nn.ReLU(inplace=True)
        self.last = convolution(features, out_channels, 1)
    def forward(self, images):
        return self.last(self.act(self.norm(self.first(images))))
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


class Extended(ModelConfig):
    """The section with keys that only some networks read."""

    residual: bool = False
    fusion: str = "early"
    modalities: int = 1
    freeze: str = ""


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_builds_every_network_in_training_mode_from_its_configuration(name: str, dimensions: int) -> None:
    config = ModelConfig(name=name, norm="instance", width=2, in_channels=3)
    if name in (VOLUMES_ONLY if dimensions == 2 else IMAGES_ONLY):
        with pytest.raises(ModelError, match=r"data\.items"):
            build(config, outputs=5, seed=0, dimensions=dimensions)
        return
    network = build(config, outputs=5, seed=0, dimensions=dimensions)
    assert network.training
    assert network(torch.randn(1, 3, *[64 if dimensions == 2 else 18] * dimensions)).shape[:2] == (1, 5)
    assert not [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d)]


def test_a_network_for_images_names_those_for_volumes() -> None:
    with pytest.raises(ModelError, match="3D: unet, attention-unet, deepmedic, small-cnn, cnn-lstm"):
        build(ModelConfig(name="resnet50"), outputs=1, seed=0, dimensions=3)


def test_a_key_that_only_one_network_reads_reaches_it() -> None:
    section = {"name": "deepmedic", "width": 3}
    plain, residual = (build(Extended(**section, residual=on), outputs=2, seed=0, dimensions=3) for on in (False, True))
    images = torch.randn(1, 1, 3, 3, 3)
    assert not torch.equal(plain.eval()(images), residual.eval()(images))


@pytest.mark.usefixtures("own")
def test_a_users_network_gets_the_keys_that_it_names() -> None:
    import own_networks

    build(Extended(name="own_networks:residual", residual=True), outputs=1, seed=0)
    assert own_networks.calls[-1] is True
    for dimensions, kind in ((2, torch.nn.Conv2d), (3, torch.nn.Conv3d)):
        network = build(ModelConfig(name="own_networks:solid"), outputs=1, seed=0, dimensions=dimensions)
        assert isinstance(network, kind)
    assert isinstance(build(ModelConfig(name="own_networks:network"), outputs=1, seed=0, dimensions=3), torch.nn.Conv2d)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_class_with_monais_keywords_is_called_by_them_and_made_ready_for_privacy(dimensions: int) -> None:
    config = ModelConfig(name="own_networks:Foreign", in_channels=3, norm="group")
    network = build(config, outputs=5, seed=0, dimensions=dimensions)
    assert network(torch.randn(2, 3, *[8] * dimensions)).shape == (2, 5, *[8] * dimensions)
    assert isinstance(network.norm, torch.nn.GroupNorm)
    assert network.act.inplace is False
    with pytest.raises(ModelError, match=r"model\.width"):
        build(ModelConfig(name="own_networks:Foreign", width=8), outputs=5, seed=0)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", ["BasicUNet", "DenseNet121", "SegResNet"])
def test_builds_monais_networks(name: str, dimensions: int) -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    network = build(ModelConfig(name=f"monai.networks.nets:{name}"), outputs=2, seed=0, dimensions=dimensions)
    assert network(torch.randn(1, 1, *[32] * dimensions)).shape[:2] == (1, 2)
    assert not [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d)]


def test_late_fusion_and_freezing_follow_the_configuration() -> None:
    section = {"name": "resnet50", "width": 2, "in_channels": 4, "fusion": "late", "modalities": 2, "freeze": "layer1"}
    network = build(Extended(**section), outputs=3, seed=0)
    assert network(torch.randn(1, 4, 32, 32)).shape == (1, 3)
    frozen = {name.split(".")[2] for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    assert {name.split(".")[1] for name, p in network.named_parameters() if not p.requires_grad} == {"0", "1"}
    first, second = (encoder.get_parameter("conv1.weight") for encoder in network.encoders)
    assert not torch.equal(first, second)  # each modality starts from its own draw


@pytest.mark.parametrize(
    ("name", "nearest"), [("chex-net", "chexnet"), ("u-net", "unet"), ("res-net50", "resnet50"), ("", "chexnet")]
)
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

    assert own_networks.calls[-2:] == [(2, 4, "batch", 9)] * 2


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
