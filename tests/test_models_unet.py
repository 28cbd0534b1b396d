"""U-Net against the paper's figure: channels, sizes, parameters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import build
from fedmed.models.unet import unet

LAYERS = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


@pytest.mark.parametrize(("dimensions", "width", "total"), [(2, 64, 31_036_546), (3, 32, 22_578_306)])
def test_has_the_papers_parameters(dimensions: int, width: int, total: int) -> None:
    kernel, half = 3**dimensions, 2**dimensions
    down, up = [width * 2**step for step in range(5)], [width * 2**step for step in (3, 2, 1, 0)]
    convolutions = 0
    before = 1
    for channels in down:
        convolutions += kernel * before * channels + kernel * channels * channels
        before = channels
    for channels in up:  # 2 x 2 up-convolution with bias, then the two halves together
        convolutions += half * 2 * channels * channels + channels + kernel * 3 * channels * channels
    norms = 2 * 2 * (sum(down) + sum(up))  # scale and shift after each of 18 convolutions
    with torch.device("meta"):
        network = unet(dimensions=dimensions)
    assert sum(p.numel() for p in network.parameters()) == convolutions + norms + 2 * width + 2 == total
    assert len([module for module in network.modules() if isinstance(module, LAYERS)]) == 23


def test_without_normalization_is_the_papers_own_network() -> None:
    with torch.device("meta"):
        biases = [name for name, _ in unet(norm="none").named_parameters() if name.endswith("bias")]
    assert len(biases) == 23


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(572, 572), (64, 64, 64)])
def test_papers_image_gives_a_mask(sides: tuple[int, ...]) -> None:
    with torch.no_grad():
        assert unet(dimensions=len(sides))(torch.randn(1, 1, *sides)).shape == (1, 2, *sides)


@pytest.mark.parametrize("size", [(16, 16), (33, 48), (1, 7), (16, 5, 17)])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_masks_have_the_size_of_their_images(norm: str, size: tuple[int, ...]) -> None:
    network = unet(in_channels=2, outputs=3, norm=norm, width=4, dimensions=len(size))
    assert network(torch.randn(2, 2, *size)).shape == (2, 3, *size)


def test_padding_is_with_zeros_at_the_bottom_and_right() -> None:
    network = unet(norm="group", width=4)
    images = torch.randn(1, 1, 20, 24)
    padded = torch.zeros(1, 1, 32, 32)
    padded[..., :20, :24] = images
    torch.testing.assert_close(network(images), network(padded)[..., :20, :24])


def test_instance_normalization_needs_seventeen_pixels() -> None:
    network = unet(norm="instance", width=2)
    assert network(torch.randn(1, 1, 17, 17)).isfinite().all()
    with pytest.raises(ModelError, match="at least 17 x 17"):
        network(torch.randn(1, 1, 16, 16))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_refuses_images_of_other_dimensions(dimensions: int) -> None:
    images = torch.zeros(1, 1, *[16] * (5 - dimensions))
    with pytest.raises(ModelError, match=rf"built for {dimensions}D images, got {5 - dimensions}D"):
        unet(width=2, dimensions=dimensions)(images)


def test_every_pixel_sees_the_whole_small_image() -> None:
    network = unet(norm="instance", width=4).double()
    images = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    network(images)[0, 0, 0, 0].backward()
    assert images.grad is not None and bool((images.grad[0, 0, 16:, 16:] != 0).any())


@pytest.mark.parametrize("name", ["unet", "attention-unet"])
@pytest.mark.parametrize("sides", [(33, 48), (17, 20, 24)], ids=["2D", "3D"])
def test_deep_supervision_adds_coarser_logits_in_training_alone(name, sides):
    config = ModelConfig(name=name, width=2, deep_supervision=True)
    network = build(config, outputs=3, seed=0, dimensions=len(sides))
    images = torch.rand(2, 1, *sides)
    shapes = [tuple(logits.shape) for logits in network(images)]
    halves = tuple(-(-side // 2) for side in sides)
    quarters = tuple(-(-side // 2) for side in halves)
    assert shapes == [(2, 3, *sides), (2, 3, *halves), (2, 3, *quarters)]
    assert network.eval()(images).shape == (2, 3, *sides)
