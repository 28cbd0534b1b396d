"""U-Net.

Ronneberger, Fischer, Brox 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (arXiv:1505.04597),
figure 1. It departs from the paper in three ways: convolutions are padded, so that a mask has the size of its image
(the paper's lose 92 pixels on each side); every convolution is followed by a normalization, whose shift takes the place
of the convolution's bias; and there is no dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.models.norms import Norm, norm_layer, require_size

SHRINK = 16  # four poolings by two


def unet(*, in_channels: int = 1, outputs: int = 2, norm: Norm = "batch", width: int = 0) -> nn.Module:
    """Returns a U-Net with one logit per label and pixel.

    Takes images (N, in_channels, H, W) of any size and returns logits (N, outputs, H, W). Sides that 16 does not divide
    are padded with zeros at the bottom and right, and cropped again at the end. With `instance` the sides must be at
    least 17 pixels, since it cannot normalize the single pixel that 16 leave at the bottom of the U.

    Args:
        in_channels: Channels of an image.
        outputs: Number of labels.
        norm: The paper has none.
        width: Channels at full resolution; 0 = the paper's 64, which makes 1024 at the bottom.
    """
    return UNet(in_channels=in_channels, outputs=outputs, norm=norm, width=width or 64)


class UNet(nn.Module):
    """Four steps down, a bottom, four steps up, each step up reading the step down of its size."""

    def __init__(self, *, in_channels: int, outputs: int, norm: Norm, width: int) -> None:
        """Builds and initializes the network."""
        super().__init__()
        self.smallest = SHRINK + 1 if norm == "instance" else 1
        self.down1 = two_convolutions(in_channels, width, norm)
        self.down2 = two_convolutions(width, 2 * width, norm)
        self.down3 = two_convolutions(2 * width, 4 * width, norm)
        self.down4 = two_convolutions(4 * width, 8 * width, norm)
        self.bottom = two_convolutions(8 * width, 16 * width, norm)
        self.grow4, self.up4 = grow(16 * width), two_convolutions(16 * width, 8 * width, norm)
        self.grow3, self.up3 = grow(8 * width), two_convolutions(8 * width, 4 * width, norm)
        self.grow2, self.up2 = grow(4 * width), two_convolutions(4 * width, 2 * width, norm)
        self.grow1, self.up1 = grow(2 * width), two_convolutions(2 * width, width, norm)
        self.classifier = nn.Conv2d(width, outputs, kernel_size=1)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs, H, W) for images (N, in_channels, H, W)."""
        require_size("unet", images, self.smallest)
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % SHRINK, 0, -height % SHRINK))

        down1 = self.down1(images)  # (N, 64, H, W)
        down2 = self.down2(F.max_pool2d(down1, 2))  # (N, 128, H/2, W/2)
        down3 = self.down3(F.max_pool2d(down2, 2))  # (N, 256, H/4, W/4)
        down4 = self.down4(F.max_pool2d(down3, 2))  # (N, 512, H/8, W/8)
        bottom = self.bottom(F.max_pool2d(down4, 2))  # (N, 1024, H/16, W/16)

        up4 = self.up4(torch.cat((down4, self.grow4(bottom)), dim=1))  # (N, 512, H/8, W/8)
        up3 = self.up3(torch.cat((down3, self.grow3(up4)), dim=1))  # (N, 256, H/4, W/4)
        up2 = self.up2(torch.cat((down2, self.grow2(up3)), dim=1))  # (N, 128, H/2, W/2)
        up1 = self.up1(torch.cat((down1, self.grow1(up2)), dim=1))  # (N, 64, H, W)

        logits: Tensor = self.classifier(up1)  # (N, outputs, H, W)
        return logits[..., :height, :width]


def two_convolutions(channels: int, outputs: int, norm: Norm) -> nn.Sequential:
    """Returns the paper's blue arrows: 3 x 3 convolution and ReLU, twice: (N, channels, H, W) -> (N, outputs, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, outputs, kernel_size=3, padding=1, bias=False),
        norm_layer(norm, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
        norm_layer(norm, outputs),
        nn.ReLU(),
    )


def grow(channels: int) -> nn.ConvTranspose2d:
    """Returns the paper's green arrow, a 2 x 2 up-convolution: (N, C, H, W) -> (N, C/2, 2 H, 2 W)."""
    return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)


def initialize(network: nn.Module) -> None:
    """Draws Gaussian weights from torch's global generator and zeroes biases.

    The deviation is √(2/n) for n incoming values (section 3 of the paper; He et al. 2015), and √(1/n) for
    up-convolutions, which no ReLU follows; there every output pixel reads one input pixel, so n is their channels.
    """
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=module.in_channels**-0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
