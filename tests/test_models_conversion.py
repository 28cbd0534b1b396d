"""From BatchNorm to GroupNorm: exact where it can be, closer than a copy of the weights elsewhere, and measured."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmed.models import group_normalized
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


@pytest.mark.parametrize("dimensions", [2, 3])
def test_folding_the_statistics_moves_outputs_less_than_copying_the_weights(dimensions: int) -> None:
    network, images = trained(dimensions)
    converted = group_normalized(network, images)
    copied = copy.deepcopy(converted.network)
    copied.load_state_dict({name: t for name, t in network.state_dict().items() if name in copied.state_dict()})
    assert converted.layers == 4
    assert not [m for m in converted.network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    assert 0 < converted.moved < 0.95 * moved(network, copied, images) < 1
    assert f"{converted.moved:.0%}" in str(converted)


def test_the_network_given_stays_as_it_was() -> None:
    network, images = trained(2)
    before = copy.deepcopy(network.state_dict())
    network.block1.eval()
    group_normalized(network, images)
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


def test_a_fresh_network_keeps_its_affine_weights() -> None:
    converted = group_normalized(unet(norm="batch", width=4), torch.randn(1, 1, 16, 16)).network
    for module in converted.modules():
        if isinstance(module, nn.GroupNorm):
            torch.testing.assert_close(module.weight, torch.ones_like(module.weight))
            torch.testing.assert_close(module.bias, torch.zeros_like(module.bias))
    assert converted.state_dict().keys() == unet(norm="group", width=4).state_dict().keys()
