"""Local weights, loaded by name: what must fit, what may differ, and whose names are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import densenet121, resnet50

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import build, build_with_report
from fedmed.models.conversion import folded
from fedmed.models.fusion import late_fusion
from fedmed.models.small_cnn import small_cnn
from fedmed.models.vgg16 import vgg16
from fedmed.models.weights import load_weights

State = dict[str, Tensor]
RANGES = {  # mean and standard deviation that a layout's images were brought to
    "own": ([0.0], [1.0]),
    "torchvision": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "chexnet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "torchxrayvision": ([0.5], [1 / 2048]),
}
SMALL = {"name": "small-cnn", "width": 4, "norm": "batch"}


def save(state: State, path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def load(path: Path) -> torch.nn.Module:
    return build(ModelConfig(**SMALL, weights=str(path)), outputs=2, seed=1)


@pytest.fixture
def state() -> State:
    return build(ModelConfig(**SMALL), outputs=2, seed=99).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_round_trip(state: State, tmp_path: Path, suffix: str) -> None:
    loaded = load(save(state, tmp_path / f"weights{suffix}")).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("classifier.bias"), r"classifier\.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not in the network"),
        (lambda s: s.update({"classifier.bias": torch.zeros(3)}), r"is \(3,\), expected \(2,\)"),
        (lambda s: s.update({"classifier.bias": torch.zeros(2, dtype=torch.int64)}), r"int64, expected torch\.float32"),
        (lambda s: s.update({"classifier.bias": torch.tensor([0.0, torch.nan])}), "NaN or infinity"),
        (lambda s: s.clear(), "; and 23 more"),
    ],
)
def test_names_what_does_not_fit(state: State, tmp_path: Path, change: Callable[[State], object], message: str) -> None:
    change(state)
    with pytest.raises(ModelError, match=message) as caught:
        load(save(state, tmp_path / "weights.safetensors"))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_refuses_a_file_cut_short(state: State, tmp_path: Path, suffix: str) -> None:
    path = save(state, tmp_path / f"weights{suffix}")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read") as caught:
        load(path)
    assert str(tmp_path) not in str(caught.value)


def test_never_unpickles_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "attacked",)

    torch.save({"classifier.bias": Attack()}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "weights.pth")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("checkpoint", [{"epoch": 3}, {"state_dict": {"epoch": 3}}, [1, 2]])
def test_refuses_a_checkpoint_without_a_state_dict(tmp_path: Path, checkpoint: object) -> None:
    torch.save(checkpoint, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="more than tensors"):
        load(tmp_path / "weights.pth")


def test_unwraps_a_checkpoint(state: State, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": state, "best_loss": 0.5}, tmp_path / "weights.pth.tar")
    loaded = load(tmp_path / "weights.pth.tar").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_file_for_other_labels_leaves_the_head_as_initialized(state: State, tmp_path: Path) -> None:
    config = ModelConfig(**SMALL, weights=str(save(state, tmp_path / "weights.safetensors")))
    built = build_with_report(config, outputs=5, seed=1)
    fresh = build(ModelConfig(**SMALL), outputs=5, seed=1).state_dict()
    loaded = built.network.state_dict()
    head = {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(loaded[name], (fresh if name in head else state)[name]) for name in loaded)
    assert built.loaded is not None
    assert set(built.loaded.fresh) == head
    assert set(built.loaded.matched) == set(state) - head
    assert str(built.loaded) == (
        f"weights (own names): {len(state) - 2} tensors as they are; "
        "classifier.weight, classifier.bias left as initialized, for other labels"
    )


@pytest.mark.parametrize("labels", [2, 5])
def test_a_kept_head_is_reported_with_its_order_of_labels(state: State, tmp_path: Path, labels: int) -> None:
    config = ModelConfig(**SMALL, weights=str(save(state, tmp_path / "weights.safetensors")))
    built = build_with_report(config, outputs=labels, seed=1)
    assert built.loaded is not None
    assert set(built.loaded.head) == ({"classifier.weight", "classifier.bias"} if labels == 2 else set())
    assert ("head kept, its outputs in the file's order of labels" in str(built)) == (labels == 2)


@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (1, 3), (3, 2), (1, 4)])
def test_a_gray_image_excites_the_first_convolution_as_before(theirs: int, ours: int, tmp_path: Path) -> None:
    source = small_cnn(in_channels=theirs, norm="group", width=4)
    path = save(source.state_dict(), tmp_path / "weights.safetensors")
    built = build_with_report(
        ModelConfig(name="small-cnn", width=4, in_channels=ours, weights=str(path)), outputs=2, seed=1
    )
    gray = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(built.network(gray.expand(-1, ours, -1, -1)), source(gray.expand(-1, theirs, -1, -1)))
    assert built.loaded is not None and built.loaded.adapted == ("block1.0.weight",)


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_batch_norm_weights_are_folded_into_another_norm(norm: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = small_cnn(norm="batch", width=4).train()
        for _ in range(3):
            source(1 + torch.randn(4, 1, 16, 16))
    path = save(source.state_dict(), tmp_path / "weights.safetensors")
    built = build_with_report(ModelConfig(name="small-cnn", width=4, norm=norm, weights=str(path)), outputs=2, seed=1)
    expected = source.state_dict()
    for name, module in built.network.named_modules():
        if isinstance(module, nn.GroupNorm) and norm == "group":
            old = source.get_submodule(name)
            expected[f"{name}.weight"], expected[f"{name}.bias"] = folded(
                old.weight, old.bias, old.running_mean, old.running_var, groups=module.num_groups
            )
    for name, tensor in built.network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert built.loaded is not None
    assert built.loaded.folded == ("block1.1", "block2.1", "block3.1", "block4.1")
    assert built.moved is not None and (0 < built.moved < 2)
    assert str(built).endswith(f"without BatchNorm the outputs moved by {built.moved:.0%} of their norm")
    assert {name.rpartition(".")[2] for name in built.loaded.unused} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_group_norm_weights_do_not_fit_a_batch_norm(tmp_path: Path) -> None:
    path = save(small_cnn(norm="group", width=4).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"block1\.1\.running_mean is missing"):
        load(path)


def old_names(state: State) -> State:
    """The names of a dense layer before 2018: `norm.1` for `norm1`."""
    pattern = re.compile(r"(denselayer\d+\.)(norm|conv)([12])\.")
    return {pattern.sub(r"\1\2.\3.", name): tensor for name, tensor in state.items()}


def as_chexnet(state: State) -> State:
    """What the public CheXNet re-implementation saves: DataParallel, a wrapper, a sigmoid, no counts of batches."""
    named = {name.replace("classifier.", "classifier.0."): tensor for name, tensor in old_names(state).items()}
    kept = {name: tensor for name, tensor in named.items() if "num_batches_tracked" not in name}
    return {f"module.densenet121.{name}": tensor for name, tensor in kept.items()}


def as_trained(network: nn.Module, images: Tensor, layout: str) -> Tensor:
    """What a network says of images that are brought into the range that it was trained on, black around them."""
    mean, std = RANGES[layout]
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    pad, first.padding = first.padding[0], (0, 0)
    black = nn.functional.pad(images, [pad] * 4)
    with torch.no_grad():
        said = network.eval()((black - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1))
    first.padding = (pad, pad)
    return said


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("own", dict),
        ("own", lambda state: {f"module.{name}": tensor for name, tensor in state.items()}),
        ("own", lambda state: {f"model.{name}": tensor for name, tensor in state.items()}),
        ("torchvision", old_names),
        ("chexnet", as_chexnet),
        ("torchxrayvision", lambda state: {**state, "op_threshs": torch.tensor([0.1, torch.nan])}),
    ],
)
def test_knows_public_densenets_and_their_range(layout: str, change: Callable[[State], State], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        source = densenet121(num_classes=14).eval()
    legacy = layout == "chexnet"  # as old as its file's format
    path = tmp_path / ("model.pth.tar" if legacy else "weights.pth")
    content = change(source.state_dict())
    torch.save(
        {"epoch": 1, "state_dict": content} if legacy else content, path, _use_new_zipfile_serialization=not legacy
    )
    config = ModelConfig(name="chexnet", norm="batch", in_channels=3, weights=str(path))
    built = build_with_report(config, outputs=14, seed=1)
    assert built.loaded is not None and built.loaded.layout == layout
    assert not built.loaded.fresh and not built.loaded.adapted
    assert built.loaded.unused == (("op_threshs",) if layout == "torchxrayvision" else ())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            built.network.eval()(images), as_trained(source, images, layout), rtol=1e-4, atol=1e-4
        )
    changed = () if layout == "own" else ("features.conv0.weight", "features.norm0.running_mean")
    assert built.loaded.rescaled == changed and not set(changed) & set(built.loaded.matched)
    assert ("the first layer rescaled from images" in str(built)) == (layout != "own")
    assert "head kept, its outputs in the file's order of labels" in str(built)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_first_convolution_with_a_bias_takes_the_range_in_there(norm: str, tmp_path: Path) -> None:
    source = vgg16(in_channels=3, outputs=1000, norm=norm, width=2)
    torch.nn.init.normal_(source.features[0].bias)
    path = save(source.state_dict(), tmp_path / "weights.safetensors")
    config = ModelConfig(name="vgg16", norm=norm, width=2, in_channels=3, weights=str(path))
    built = build_with_report(config, outputs=1000, seed=1)
    images = torch.rand(2, 3, 32, 40)
    torch.testing.assert_close(built.network.eval()(images), as_trained(source, images, "torchvision"))
    assert built.loaded is not None and built.loaded.rescaled == ("features.0.weight", "features.0.bias")


def test_loads_torchvisions_resnet_and_torchxrayvisions_wrapped_one(tmp_path: Path) -> None:
    source = resnet50(num_classes=1000)
    one = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("fc.")}
    gray = source.conv1.weight.detach().sum(dim=1, keepdim=True)
    source.bn1.running_mean.normal_()
    wrapped = {f"model.{name}": tensor for name, tensor in {**one, "conv1.weight": gray}.items()}
    wrapped |= {
        "model.fc.weight": torch.zeros(18, 2048),
        "model.fc.bias": torch.zeros(18),
        "op_threshs": torch.ones(18),
    }
    found = []
    for name, content in (("tv", source.state_dict()), ("xrv", wrapped)):
        path = save(content, tmp_path / f"{name}.safetensors")
        config = ModelConfig(name="resnet50", norm="batch", weights=str(path))
        found.append(build_with_report(config, outputs=2, seed=1))
    assert [built.loaded.layout for built in found if built.loaded] == ["torchvision", "torchxrayvision"]
    assert [built.loaded.adapted for built in found if built.loaded] == [("conv1.weight",), ()]
    assert all(set(built.loaded.fresh) == {"fc.weight", "fc.bias"} for built in found if built.loaded)
    images = torch.rand(1, 1, 32, 32)
    weights = {"torchvision": source.conv1.weight, "torchxrayvision": gray}
    for built, (layout, weight) in zip(found, weights.items(), strict=True):
        source.fc, source.conv1.weight = built.network.fc, nn.Parameter(weight)
        with torch.no_grad():
            said = built.network.eval()(images)
        shown = images.expand(-1, weight.shape[1], -1, -1)
        torch.testing.assert_close(said, as_trained(source, shown, layout), rtol=1e-3, atol=1e-3)


def test_late_fusion_takes_the_weights_of_one_encoder_into_each(tmp_path: Path) -> None:
    source = small_cnn(in_channels=3, outputs=9, norm="group", width=4)
    network = late_fusion(
        lambda channels: small_cnn(in_channels=channels, norm="group", width=4), in_channels=2, modalities=2, outputs=2
    )
    head = network.head.weight.clone()
    loaded = load_weights(network, save(source.state_dict(), tmp_path / "weights.safetensors"))
    for encoder in network.encoders:
        assert torch.equal(encoder.get_parameter("block4.0.weight"), source.get_parameter("block4.0.weight"))
    assert loaded.adapted == ("encoders.0.block1.0.weight", "encoders.1.block1.0.weight")
    assert loaded.fresh == ("head.weight", "head.bias") and torch.equal(network.head.weight, head)
    assert set(loaded.unused) == {"classifier.weight", "classifier.bias"}
    again = load_weights(network, save(network.state_dict(), tmp_path / "fused.safetensors"))
    assert set(again.matched) == set(network.state_dict())


@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias"])
def test_half_a_head_for_other_labels_is_refused(state: State, tmp_path: Path, name: str) -> None:
    state[name] = torch.zeros(3, *state[name].shape[1:])
    with pytest.raises(ModelError, match="is \\(3,"):
        load(save(state, tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("name", ["absent.pth", "weights.onnx"])
def test_refuses_a_missing_file_and_a_foreign_type(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(ModelError, match=r"expected .*\.safetensors"):
        load(tmp_path / name)
