"""Attention U-Net: a U-Net whose skip connections pass through additive attention gates, for images and for volumes.

Oktay et al. 2018, "Attention U-Net: Learning Where to Look for the Pancreas" (arXiv:1804.03999), figures 1 and 2 and
equations 1 and 2. As in the paper, the maps on the way up grow by interpolation, and the skip connection at full
resolution has no gate, since its features are too local to tell where to look. It departs from the paper in one way:
deep supervision is a setting, and without it the network has one output like every other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError
from fedmed.models.norms import Norm
from fedmed.models.spatial import CONVOLUTIONS, cropped, padded, require_size
from fedmed.models.stages import before_head
from fedmed.models.unet import SHRINK, initialize, supervised, two_convolutions

WIDTH = 16  # the authors' networks: the U-Net's 64 divided by four
LINEAR = {2: "bilinear", 3: "trilinear"}


def attention_unet(
    *,
    in_channels: int = 1,
    outputs: int = 2,
    norm: Norm = "batch",
    width: int = 0,
    dimensions: int = 2,
    deep_supervision: bool = False,
) -> nn.Module:
    """Returns an Attention U-Net with one logit per label and pixel; see `gate_maps` for what it looked at.

    Takes images (N, in_channels, [D,] H, W) of any size and returns logits (N, outputs, [D,] H, W). Sides that 16 does
    not divide are padded with zeros at the end, and cropped again. With `instance` the sides must be at least 17
    pixels.

    Args:
        in_channels: Channels of an image.
        outputs: Number of labels.
        norm: `batch` is the authors'.
        width: Channels at full resolution; 0 = the authors' 16 (256 at the bottom), in 2D as in 3D.
        dimensions: 2 for images, 3 for volumes, as in the paper.
        deep_supervision: In training, the logits are followed by coarser ones of half and a quarter of the sides.
    """
    return AttentionUNet(
        in_channels=in_channels,
        outputs=outputs,
        norm=norm,
        width=width or WIDTH,
        dimensions=dimensions,
        deep_supervision=deep_supervision,
    )


class AttentionUNet(nn.Module):
    """Four steps down, a bottom, four steps up; three of them read the step down of their size through a gate."""

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
        self.gate4 = Gate(8 * width, 16 * width, dimensions)
        self.up4 = two_convolutions(24 * width, 8 * width, norm, dimensions)
        self.gate3 = Gate(4 * width, 8 * width, dimensions)
        self.up3 = two_convolutions(12 * width, 4 * width, norm, dimensions)
        self.gate2 = Gate(2 * width, 4 * width, dimensions)
        self.up2 = two_convolutions(6 * width, 2 * width, norm, dimensions)
        self.up1 = two_convolutions(3 * width, width, norm, dimensions)
        self.classifier = CONVOLUTIONS[dimensions](width, outputs, kernel_size=1)
        coarser = (2 * width, 4 * width) if deep_supervision else ()
        self.coarser = nn.ModuleList(CONVOLUTIONS[dimensions](each, outputs, kernel_size=1) for each in coarser)
        self.stage_prefixes = before_head(self, "classifier", "coarser")
        initialize(self)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Returns logits (N, outputs, [D,] H, W) for images (N, in_channels, [D,] H, W).

        In training with deep supervision, a tuple: these, and logits of half and of a quarter of the sides.
        """
        return self.logits_and_gates(images)[0]

    def logits_and_gates(self, images: Tensor) -> tuple[Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns logits (N, outputs, [D,] H, W) and three maps of α, coarsest first, at their own resolutions."""
        require_size("attention-unet", images, self.smallest, self.dimensions)
        sides = images.shape[2:]
        images = padded(images, SHRINK)

        down1 = self.down1(images)  # (N, 16, H, W)
        down2 = self.down2(self.pool(down1))  # (N, 32, H/2, W/2)
        down3 = self.down3(self.pool(down2))  # (N, 64, H/4, W/4)
        down4 = self.down4(self.pool(down3))  # (N, 128, H/8, W/8)
        bottom = self.bottom(self.pool(down4))  # (N, 256, H/16, W/16)

        alpha4 = self.gate4(down4, bottom)  # (N, 1, H/8, W/8)
        up4 = self.up4(torch.cat((alpha4 * down4, twice(bottom)), dim=1))  # (N, 128, H/8, W/8)
        alpha3 = self.gate3(down3, up4)  # (N, 1, H/4, W/4)
        up3 = self.up3(torch.cat((alpha3 * down3, twice(up4)), dim=1))  # (N, 64, H/4, W/4)
        alpha2 = self.gate2(down2, up3)  # (N, 1, H/2, W/2)
        up2 = self.up2(torch.cat((alpha2 * down2, twice(up3)), dim=1))  # (N, 32, H/2, W/2)
        up1 = self.up1(torch.cat((down1, twice(up2)), dim=1))  # (N, 16, H, W)

        logits = cropped(self.classifier(up1), sides)  # (N, outputs, H, W)
        several = supervised(logits, self.coarser, (up2, up3)) if self.training and len(self.coarser) else logits
        return several, (alpha4, alpha3, alpha2)


class Gate(nn.Module):
    """How much of each pixel x of a skip connection may pass, given coarser features g that know the surroundings.

    α = σ(ψᵀ ReLU(W_xᵀ x + W_gᵀ g + b_g) + b_ψ)   (Oktay et al. 2018, eq. 1 and 2), evaluated on the grid of g, which
    is half as fine as that of x, and interpolated to the grid of x.
    """

    def __init__(self, channels: int, gating: int, dimensions: int) -> None:
        """Reads x of `channels` and g of `gating` feature maps; as many intermediate ones as x has, as the authors."""
        super().__init__()
        convolution = CONVOLUTIONS[dimensions]
        self.of_skip = convolution(channels, channels, kernel_size=2, stride=2, bias=False)  # W_x
        self.of_gating = convolution(gating, channels, kernel_size=1)  # W_g, b_g
        self.psi = convolution(channels, 1, kernel_size=1)  # ψ, b_ψ

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        """Returns α (N, 1, [D,] H, W) in (0, 1) for x (N, C, [D,] H, W) and g (N, C', [D/2,] H/2, W/2)."""
        together = F.relu(self.of_skip(skip) + self.of_gating(gating))  # (N, C, H/2, W/2)
        return twice(torch.sigmoid(self.psi(together)))


def twice(maps: Tensor) -> Tensor:
    """Returns maps (N, C, [D,] H, W) interpolated linearly to twice the size."""
    return F.interpolate(maps, scale_factor=2, mode=LINEAR[maps.dim() - 2])


def gate_maps(module: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Returns what the three gates let pass, coarsest first: each (N, 1, [D,] H, W) in [0, 1], the size of the images.

    Args:
        module: An Attention U-Net; its training mode is kept.
        images: (N, C, [D,] H, W).

    Raises:
        ModelError: If the network has no gates.
    """
    if not isinstance(module, AttentionUNet):
        raise ModelError("only attention-unet has gates to show")
    sides = images.shape[2:]
    whole = padded(images, SHRINK).shape[2:]
    with torch.no_grad():
        _, gates = module.logits_and_gates(images)
        linear = LINEAR[module.dimensions]
        return tuple(cropped(F.interpolate(gate, size=tuple(whole), mode=linear), sides) for gate in gates)
