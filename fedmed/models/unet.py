"""U-Net, for images and for volumes.

Ronneberger, Fischer, Brox 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (arXiv:1505.04597),
figure 1. It departs from the paper in three ways: convolutions are padded, so that a mask has the size of its image
(the paper's lose 92 pixels on each side); every convolution is followed by a normalization, whose shift takes the place
of the convolution's bias (norm = none: as in the paper); and there is no dropout. In 3D the same U has 3 x 3 x 3
convolutions and 2 x 2 x 2 poolings (Çiçek et al. 2016, "3D U-Net", arXiv:1606.06650, has three of these instead of
four).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmed.models.norms import Norm, norm_layer
from fedmed.models.spatial import CONVOLUTIONS, UP_CONVOLUTIONS, cropped, padded, require_size
from fedmed.models.stages import before_head

SHRINK = 16  # four poolings by two
WIDTHS = {2: 64, 3: 32}  # 2D: the paper's. 3D: the first layer of 3D U-Net; 64 would make 90 million parameters


def unet(
    *,
    in_channels: int = 1,
    outputs: int = 2,
    norm: Norm = "batch",
    width: int = 0,
    dimensions: int = 2,
    deep_supervision: bool = False,
) -> nn.Module:
    """Returns a U-Net with one logit per label and pixel.

    Takes images (N, in_channels, [D,] H, W) of any size and returns logits (N, outputs, [D,] H, W). Sides that 16 does
    not divide are padded with zeros at the end, and cropped again. With `instance` the sides must be at least 17
    pixels, since it cannot normalize the single pixel that 16 leave at the bottom of the U.

    Args:
        in_channels: Channels of an image.
        outputs: Number of labels.
        norm: The paper has none.
        width: Channels at full resolution; 0 = the paper's 64 (1024 at the bottom), in 3D 32 (512 at the bottom).
        dimensions: 2 for images, 3 for volumes.
        deep_supervision: In training, the logits are followed by coarser ones of half and a quarter of the sides.
    """
    width = width or WIDTHS[dimensions]
    return UNet(
        in_channels=in_channels,
        outputs=outputs,
        norm=norm,
        width=width,
        dimensions=dimensions,
        deep_supervision=deep_supervision,
    )


class UNet(nn.Module):
    """Four steps down, a bottom, four steps up, each step up reading the step down of its size."""

    def __init__(
        self, *, in_channels: int, outputs: int, norm: Norm, width: int, dimensions: int, deep_supervision: bool
    ) -> None:
        """Builds and initializes the network."""
        super().__init__()
        self.dimensions = dimensions
        self.smallest = SHRINK + 1 if norm == "instance" else 1
        self.pool = nn.MaxPool2d(2) if dimensions == 2 else nn.MaxPool3d(2)
        self.down1 = two_convolutions(in_channels, width, norm, dimensions)
        self.down2 = two_convolutions(width, 2 * width, norm, dimensions)
        self.down3 = two_convolutions(2 * width, 4 * width, norm, dimensions)
        self.down4 = two_convolutions(4 * width, 8 * width, norm, dimensions)
        self.bottom = two_convolutions(8 * width, 16 * width, norm, dimensions)
        self.grow4, self.up4 = grow(16 * width, dimensions), two_convolutions(16 * width, 8 * width, norm, dimensions)
        self.grow3, self.up3 = grow(8 * width, dimensions), two_convolutions(8 * width, 4 * width, norm, dimensions)
        self.grow2, self.up2 = grow(4 * width, dimensions), two_convolutions(4 * width, 2 * width, norm, dimensions)
        self.grow1, self.up1 = grow(2 * width, dimensions), two_convolutions(2 * width, width, norm, dimensions)
        self.classifier = CONVOLUTIONS[dimensions](width, outputs, kernel_size=1)
        coarser = (2 * width, 4 * width) if deep_supervision else ()
        self.coarser = nn.ModuleList(CONVOLUTIONS[dimensions](each, outputs, kernel_size=1) for each in coarser)
        self.stage_prefixes = before_head(self, "classifier", "coarser")
        initialize(self)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Returns logits (N, outputs, [D,] H, W) for images (N, in_channels, [D,] H, W).

        In training with deep supervision, a tuple: these, and logits of half and of a quarter of the sides.
        """
        require_size("unet", images, self.smallest, self.dimensions)
        sides = images.shape[2:]
        images = padded(images, SHRINK)

        down1 = self.down1(images)  # (N, 64, H, W)
        down2 = self.down2(self.pool(down1))  # (N, 128, H/2, W/2)
        down3 = self.down3(self.pool(down2))  # (N, 256, H/4, W/4)
        down4 = self.down4(self.pool(down3))  # (N, 512, H/8, W/8)
        bottom = self.bottom(self.pool(down4))  # (N, 1024, H/16, W/16)

        up4 = self.up4(torch.cat((down4, self.grow4(bottom)), dim=1))  # (N, 512, H/8, W/8)
        up3 = self.up3(torch.cat((down3, self.grow3(up4)), dim=1))  # (N, 256, H/4, W/4)
        up2 = self.up2(torch.cat((down2, self.grow2(up3)), dim=1))  # (N, 128, H/2, W/2)
        up1 = self.up1(torch.cat((down1, self.grow1(up2)), dim=1))  # (N, 64, H, W)

        logits = cropped(self.classifier(up1), sides)  # (N, outputs, H, W)
        return supervised(logits, self.coarser, (up2, up3)) if self.training and len(self.coarser) else logits


def supervised(logits: Tensor, heads: nn.ModuleList, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns logits and what the heads make of coarser maps, cropped as the logits were."""
    coarser, sides = [], tuple(logits.shape[2:])
    for head, features in zip(heads, maps, strict=True):
        sides = tuple(-(-side // 2) for side in sides)
        coarser.append(cropped(head(features), sides))
    return logits, *coarser


def two_convolutions(channels: int, outputs: int, norm: Norm, dimensions: int = 2) -> nn.Sequential:
    """Returns the paper's blue arrows: 3 x 3 convolution and ReLU, twice: (N, channels, …) -> (N, outputs, …)."""
    convolution, bias = CONVOLUTIONS[dimensions], norm == "none"
    return nn.Sequential(
        convolution(channels, outputs, kernel_size=3, padding=1, bias=bias),
        norm_layer(norm, outputs, dimensions),
        nn.ReLU(),
        convolution(outputs, outputs, kernel_size=3, padding=1, bias=bias),
        norm_layer(norm, outputs, dimensions),
        nn.ReLU(),
    )


def grow(channels: int, dimensions: int = 2) -> nn.Module:
    """Returns the paper's green arrow, a 2 x 2 up-convolution: (N, C, H, W) -> (N, C/2, 2 H, 2 W)."""
    return UP_CONVOLUTIONS[dimensions](channels, channels // 2, kernel_size=2, stride=2)


def initialize(network: nn.Module) -> None:
    """Draws Gaussian weights from torch's global generator and zeroes biases.

    The deviation is √(2/n) for n incoming values (section 3 of the paper; He et al. 2015), and √(1/n) for
    up-convolutions, which no ReLU follows; there every output pixel reads one input pixel, so n is their channels.
    """
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.normal_(module.weight, std=module.in_channels**-0.5)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
