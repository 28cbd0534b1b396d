"""Networks train under DP-SGD: nothing works in place, and opacus' per-sample gradients are those of single images."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator

import fedmed.models
from fedmed.config import ModelConfig
from fedmed.models import MODELS, build

SOURCES = sorted(Path(fedmed.models.__file__).parent.glob("*.py"))
SIZES = {"chexnet": 64, "unet": 32, "small-cnn": 16}
WIDTHS = {"chexnet": 2, "unet": 2, "small-cnn": 4}


def small(name: str, norm: str) -> torch.nn.Module:
    return build(ModelConfig(name=name, norm=norm, width=WIDTHS[name]), outputs=2, seed=5)


def noise(name: str) -> torch.Tensor:
    shape = (3, 1, SIZES[name], SIZES[name])
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("name", MODELS)
def test_per_sample_gradients_equal_a_loop_over_single_images(name: str, norm: str) -> None:
    network = small(name, norm).double()
    images = noise(name).requires_grad_()  # else opacus' backward hook of the first layer warns

    private = GradSampleModule(network, loss_reduction="sum")
    private(images).square().sum().backward()
    per_sample = {key: p.grad_sample for key, p in network.named_parameters()}
    private.to_standard_module()

    largest = max(float(gradient.abs().max()) for gradient in per_sample.values())
    for i in range(len(images)):
        gradients = torch.autograd.grad(network(images[i : i + 1]).square().sum(), list(network.parameters()))
        for (key, found), expected in zip(per_sample.items(), gradients, strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-10 * largest, msg=f"{key}, image {i}")


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("name", MODELS)
def test_opacus_accepts_the_network(name: str, norm: str) -> None:
    assert ModuleValidator.validate(small(name, norm), strict=False) == []


@pytest.mark.parametrize("name", MODELS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    network = small(name, "group").double()
    images = noise(name)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("name", MODELS)
def test_no_module_works_in_place_or_drops_out(name: str, norm: str) -> None:
    for module in small(name, norm).modules():
        assert not getattr(module, "inplace", False)
        assert not isinstance(module, torch.nn.modules.dropout._DropoutNd)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_has_no_operation_in_place(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AugAssign), f"line {node.lineno}"
        assert not (isinstance(node, ast.keyword) and node.arg == "inplace"), f"line {node.lineno}"
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "forward":
            called = {node.func.attr for node in ast.walk(function) if _is_method_call(node)}
            assert not {name for name in called if name.endswith("_")}


def _is_method_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
