"""Local weights, loaded strictly by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import build

State = dict[str, Tensor]
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


def test_refuses_a_checkpoint_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="more than tensors"):
        load(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["absent.pth", "weights.onnx"])
def test_refuses_a_missing_file_and_a_foreign_type(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(ModelError, match=r"expected .*\.safetensors"):
        load(tmp_path / name)
