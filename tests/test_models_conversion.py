"""From BatchNorm to GroupNorm: exact where it can be, closer than a copy of the weights elsewhere, and measured."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fedmed.config import ModelConfig
from fedmed.models import Built, build_with_report
from fedmed.models.conversion import folded, moved
from fedmed.models.small_cnn import small_cnn
from fedmed.models.unet import unet


def bars(count: int, generator: torch.Generator, dimensions: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 16, …) of a bright bar on noise, upright in every second, and which these are (N, 1)."""
    targets = torch.arange(count).remainder(2).float()[:, None]
    images = 0.3 * torch.randn(count, 1, *[16] * dimensions, generator=generator)
    images[::2, ..., 6:9, :] += 1
    images[1::2, ..., :, 6:9] += 1
    return images, targets


def trained(dimensions: int) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        network = small_cnn(outputs=1, norm="batch", width=8, dimensions=dimensions)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(30):
        images, targets = bars(16, generator, dimensions)
        loss = nn.functional.binary_cross_entropy_with_logits(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(30):  # running statistics lag behind the weights
            network(bars(16, generator, dimensions)[0])
    return network, bars(64, generator, dimensions)[0]


def grouped(name: str, network: nn.Module, images: Tensor, folder: Path, *, width: int) -> Built:
    """The network as a run with GroupNorm starts from its weights file."""
    path = folder / "weights.safetensors"
    save_file(network.state_dict(), path)
    model = ModelConfig(name=name, width=width, norm="group", weights=str(path))
    return build_with_report(model, outputs=1, seed=0, dimensions=images.dim() - 2, images=images)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_folding_the_statistics_moves_outputs_less_than_copying_the_weights(dimensions: int, tmp_path: Path) -> None:
    network, images = trained(dimensions)
    built = grouped("small-cnn", network, images, tmp_path, width=8)
    copied = copy.deepcopy(built.network)
    copied.load_state_dict({name: t for name, t in network.state_dict().items() if name in copied.state_dict()})
    assert built.loaded is not None and len(built.loaded.folded) == 4
    assert not [m for m in built.network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    assert built.moved == pytest.approx(moved(network, built.network, images), rel=1e-4)
    assert 0 < built.moved < 0.95 * moved(network, copied, images) < 1


def test_networks_that_are_compared_stay_as_they_were() -> None:
    network, images = trained(2)
    before = copy.deepcopy(network.state_dict())
    network.block1.eval()
    assert moved(network, copy.deepcopy(network), images) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training and network.block2.training and not network.block1.training


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1))
def test_an_image_with_the_running_statistics_gives_equal_outputs(groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = nn.BatchNorm2d(8).double().eval()
    for tensor in (batch.weight, batch.bias, batch.running_mean):
        tensor.data.normal_(generator=generator)
    image = torch.randn(1, 8, 5, 5, generator=generator, dtype=torch.float64) * 3
    batch.running_mean.copy_(image.mean(dim=(0, 2, 3)))
    batch.running_var.copy_(image.var(dim=(0, 2, 3), correction=0))
    group = nn.GroupNorm(groups, 8).double()
    scale, shift = folded(batch.weight, batch.bias, batch.running_mean, batch.running_var, groups=groups)
    group.weight.data, group.bias.data = scale, shift
    torch.testing.assert_close(group(image), batch(image), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_instance_norm_keeps_the_affine_weights(seed: int) -> None:
    weight, bias, mean, variance = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).unbind()
    scale, shift = folded(weight, bias, mean, variance.square(), groups=6)
    torch.testing.assert_close(scale, weight)
    torch.testing.assert_close(shift, bias)


def test_a_fresh_network_keeps_its_affine_weights(tmp_path: Path) -> None:
    source = unet(norm="batch", width=4)
    converted = grouped("unet", source, torch.randn(1, 1, 16, 16), tmp_path, width=4).network
    norms = [module for module in converted.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    for module in norms:
        torch.testing.assert_close(module.weight, torch.ones_like(module.weight))
        torch.testing.assert_close(module.bias, torch.zeros_like(module.bias))
