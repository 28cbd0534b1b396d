"""Attention U-Net against its equations: parameters, sizes, and gates that can be seen and felt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fedmed.errors import ModelError
from fedmed.models import gate_maps
from fedmed.models.attention_unet import Gate, attention_unet
from fedmed.models.unet import unet


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def two(before: int, after: int, kernel: int) -> int:
    """Two convolutions without bias, with scale and shift after each."""
    return kernel * (before * after + after * after) + 2 * 2 * after


@pytest.mark.parametrize(("dimensions", "total"), [(2, 2_093_301), (3, 6_101_013)])
def test_parameter_count_by_hand(dimensions: int, total: int) -> None:
    kernel, half = 3**dimensions, 2**dimensions
    down = sum(two(a, b, kernel) for a, b in [(1, 16), (16, 32), (32, 64), (64, 128), (128, 256)])
    up = sum(two(a + b, b, kernel) for a, b in [(256, 128), (128, 64), (64, 32), (32, 16)])  # interpolated, and skip
    gates = 0
    for skip, gating in [(128, 256), (64, 128), (32, 64)]:
        gates += half * skip * skip + (gating * skip + skip) + (skip + 1)  # W_x; W_g, b_g; ψ, b_ψ
    with torch.device("meta"):
        network = attention_unet(dimensions=dimensions)
    assert sum(p.numel() for p in network.parameters()) == down + up + gates + (16 * 2 + 2) == total
    if dimensions == 3:  # the paper's U-Net without gates: 5.88 million
        assert down + up == 5_885_488


@pytest.mark.parametrize("sides", [(16, 16), (33, 20), (1, 7), (16, 9, 17)])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_masks_have_the_size_of_their_images(norm: str, sides: tuple[int, ...]) -> None:
    network = attention_unet(in_channels=2, outputs=3, norm=norm, width=2, dimensions=len(sides))
    assert network(torch.randn(2, 2, *sides)).shape == (2, 3, *sides)


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(256, 256), (96, 160, 160)])
def test_papers_input_gives_a_mask(sides: tuple[int, ...]) -> None:
    with torch.no_grad():
        network = attention_unet(dimensions=len(sides))
        assert network(torch.randn(1, 1, *sides)).shape == (1, 2, *sides)


@pytest.mark.parametrize("sides", [(40, 24), (16, 24, 20)])
def test_gate_maps_are_as_large_as_the_images_and_between_nothing_and_all(sides: tuple[int, ...]) -> None:
    network = attention_unet(norm="group", width=4, dimensions=len(sides))
    maps = gate_maps(network, torch.randn(2, 1, *sides))
    assert [gate.shape for gate in maps] == [(2, 1, *sides)] * 3
    assert all(0 <= float(gate.min()) <= float(gate.max()) <= 1 for gate in maps)
    assert all(float(gate.std()) > 0 for gate in maps)
    assert network.training


def test_a_shut_gate_hides_its_skip_connection() -> None:
    network = attention_unet(norm="group", width=4)
    images = torch.randn(1, 1, 32, 32)

    def seen(bias: float) -> tuple[Tensor, Tensor]:
        for gate in (network.gate2, network.gate3, network.gate4):
            torch.nn.init.constant_(gate.psi.bias, bias)
        skip = network.down2(network.pool(network.down1(images))).detach().requires_grad_()
        network.up2(
            torch.cat((network.gate2(skip, torch.zeros(1, 16, 8, 8)) * skip, torch.zeros(1, 16, 16, 16)), 1)
        ).sum().backward()
        return gate_maps(network, images)[2], skip.grad

    shut, gradient = seen(-1e3)
    assert not shut.any() and not gradient.any()
    opened, gradient = seen(1e3)
    assert bool((opened == 1).all()) and bool(gradient.any())


def test_gate_follows_its_equation_pixel_by_pixel() -> None:
    gate = Gate(3, 5, dimensions=2).double()
    skip, gating = torch.randn(1, 3, 4, 6, dtype=torch.float64), torch.randn(1, 5, 2, 3, dtype=torch.float64)
    wx, wg, bg = gate.of_skip.weight, gate.of_gating.weight[:, :, 0, 0], gate.of_gating.bias
    psi, bias = gate.psi.weight[0, :, 0, 0], gate.psi.bias[0]
    coarse = torch.empty(2, 3, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            patch = skip[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            of_x = (wx * patch).sum(dim=(1, 2, 3))
            coarse[i, j] = torch.sigmoid(psi @ torch.relu(of_x + wg @ gating[0, :, i, j] + bg) + bias)
    expected = torch.nn.functional.interpolate(coarse[None, None], size=(4, 6), mode="bilinear")
    torch.testing.assert_close(gate(skip, gating), expected)


def test_a_network_without_gates_has_none_to_show() -> None:
    with pytest.raises(ModelError, match="attention-unet"):
        gate_maps(unet(width=2), torch.zeros(1, 1, 16, 16))
