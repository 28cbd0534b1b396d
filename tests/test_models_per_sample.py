"""Networks train under DP-SGD: nothing works in place, and per-sample gradients are those of single images."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fedmed.models
from fedmed.config import ModelConfig
from fedmed.models import MODELS, build
from fedmed.models.deepmedic import deepmedic
from fedmed.models.fusion import late_fusion
from fedmed.models.small_cnn import small_cnn
from fedmed.models.unet import unet

SOURCES = sorted(Path(fedmed.models.__file__).parent.glob("*.py"))
CASES = {  # name, dimensions: width, sides of an image
    ("chexnet", 2): (2, (64, 64)),
    ("resnet50", 2): (2, (48, 40)),
    ("vgg16", 2): (2, (32, 32)),
    ("unet", 2): (2, (32, 32)),
    ("unet", 3): (2, (16, 12, 16)),
    ("attention-unet", 2): (2, (32, 32)),
    ("attention-unet", 3): (2, (16, 16, 9)),
    ("deepmedic", 2): (3, (9, 9)),
    ("deepmedic", 3): (3, (3, 6, 4)),
    ("small-cnn", 2): (4, (16, 16)),
    ("small-cnn", 3): (2, (16, 16, 16)),
    ("cnn-lstm", 3): (2, (4, 8, 8)),
}
DROPS_OUT = {"vgg16", "deepmedic"}  # as their papers do
NORMED = [(*case, "group") for case in CASES] + [  # a 3D U-Net leaves a single voxel at the bottom of these images
    (*case, "instance") for case in CASES if case not in {("unet", 3), ("attention-unet", 3)}
]
BOTH_NORMS = pytest.mark.parametrize(("name", "dimensions", "norm"), NORMED)
KINDS = pytest.mark.parametrize(("name", "dimensions"), CASES)


def small(name: str, dimensions: int, norm: str) -> nn.Module:
    width = CASES[name, dimensions][0]
    network = build(ModelConfig(name=name, norm=norm, width=width), outputs=2, seed=5, dimensions=dimensions)
    return steady(network)


def steady(network: nn.Module) -> nn.Module:
    """The network in double precision, drawing nothing: opacus works in training mode only."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return network.double()


def noise(sides: tuple[int, ...], channels: int = 1) -> Tensor:
    return torch.randn((3, channels, *sides), generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def one_by_one(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Gradients of the sum of squares, (N, *shape) for every parameter, by a loop over single images."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    rows = [torch.autograd.grad(network(image[None]).square().sum(), parameters) for image in images]
    return {name: torch.stack(row) for name, row in zip(names, zip(*rows, strict=True), strict=True)}


def by_hooks(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()  # else opacus' backward hook of the first layer warns
    private = GradSampleModule(network, loss_reduction="sum")
    private(images).square().sum().backward()
    found = {name: parameter.grad_sample for name, parameter in network.named_parameters()}
    private.to_standard_module()
    return found


def by_vmap(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(network, parameters, (image[None],)).square().sum()

    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0))(parameters, images)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-10 * largest, msg=name)


@BOTH_NORMS
def test_opacus_per_sample_gradients_equal_a_loop_over_single_images(name: str, dimensions: int, norm: str) -> None:
    network, images = small(name, dimensions, norm), noise(CASES[name, dimensions][1])
    assert_equal(by_hooks(network, images), one_by_one(network, images))


@KINDS
def test_vmapped_per_sample_gradients_equal_a_loop_over_single_images(name: str, dimensions: int) -> None:
    network, images = small(name, dimensions, "group"), noise(CASES[name, dimensions][1])
    assert_equal(by_vmap(network, images), one_by_one(network, images))


@pytest.mark.parametrize("method", [by_hooks, by_vmap])
def test_residual_deepmedic_has_per_sample_gradients(method) -> None:  # type: ignore[no-untyped-def]
    network = steady(deepmedic(norm="group", width=3, residual=True))
    images = noise((3, 3, 3))
    assert_equal(method(network, images), one_by_one(network, images))


@pytest.mark.parametrize("method", [by_hooks, by_vmap])
@pytest.mark.parametrize("make", [small_cnn, unet])
def test_late_fusion_has_per_sample_gradients_with_a_modality_missing_from_one_image(make, method) -> None:  # type: ignore[no-untyped-def]
    network = late_fusion(
        lambda channels: make(in_channels=channels, norm="group", width=2), in_channels=2, modalities=2, outputs=3
    ).double()
    images = noise((16, 16), channels=2)
    images[1, 0] = 0
    gradients = one_by_one(network, images)
    assert_equal(method(network, images), gradients)
    first = {name: gradient for name, gradient in gradients.items() if name.startswith("encoders.0.")}
    assert first and not any(gradient[1].any() for gradient in first.values())


@BOTH_NORMS
def test_opacus_accepts_the_network(name: str, dimensions: int, norm: str) -> None:
    assert ModuleValidator.validate(small(name, dimensions, norm), strict=False) == []


@KINDS
def test_an_image_does_not_depend_on_its_batch(name: str, dimensions: int) -> None:
    network, images = small(name, dimensions, "group"), noise(CASES[name, dimensions][1])
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@KINDS
def test_no_module_works_in_place_and_only_the_papers_networks_drop_out(name: str, dimensions: int, norm: str) -> None:
    modules = list(small(name, dimensions, norm).modules())
    assert not any(getattr(module, "inplace", False) for module in modules)
    drops = any(isinstance(module, torch.nn.modules.dropout._DropoutNd) for module in modules)
    assert drops == (name in DROPS_OUT)


def test_every_network_is_among_the_cases() -> None:
    assert {name for name, _ in CASES} == set(MODELS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_has_no_operation_in_place(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    is_network = "forward" in {function.name for function in functions}
    for function in functions:
        inside = list(ast.walk(function))
        assert not [node for node in inside if isinstance(node, ast.keyword) and node.arg == "inplace"], function.name
        if is_network and function.name not in ("__init__", "initialize"):
            assert not [node for node in inside if isinstance(node, ast.AugAssign)], function.name
            called = {node.func.attr for node in inside if _is_method_call(node)}
            assert not {name for name in called if name.endswith("_")}, function.name


def _is_method_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
