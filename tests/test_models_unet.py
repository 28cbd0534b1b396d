"""U-Net against the paper's figure: channels, sizes, parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmed.errors import ModelError
from fedmed.models.unet import unet


def test_has_the_papers_parameters() -> None:
    convolutions = 0
    before = 1
    for channels in (64, 128, 256, 512, 1024):  # down
        convolutions += 9 * before * channels + 9 * channels * channels
        before = channels
    for channels in (512, 256, 128, 64):  # up: 2 x 2 up-convolution with bias, then the two halves together
        convolutions += 4 * 2 * channels * channels + channels + 9 * 2 * channels * channels + 9 * channels * channels
    norms = 2 * 2 * (2 * (64 + 128 + 256 + 512) + 1024)  # scale and shift after each of 18 convolutions
    with torch.device("meta"):
        network = unet()
    assert sum(p.numel() for p in network.parameters()) == convolutions + norms + 2 * 64 + 2 == 31_036_546
    assert len([module for module in network.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]) == 23


@pytest.mark.parametrize("size", [(16, 16), (33, 48), (1, 7)])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_masks_have_the_size_of_their_images(norm: str, size: tuple[int, int]) -> None:
    network = unet(in_channels=2, outputs=3, norm=norm, width=4)
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


def test_every_pixel_sees_the_whole_small_image() -> None:
    network = unet(norm="instance", width=4).double()
    images = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    network(images)[0, 0, 0, 0].backward()
    assert images.grad is not None and bool((images.grad[0, 0, 16:, 16:] != 0).any())
