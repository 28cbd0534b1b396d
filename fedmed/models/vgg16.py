"""VGG-16.

Simonyan & Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv:1409.1556),
table 1, configuration D. Parameters have torchvision's names, so that its weights load as they are: those of `vgg16`
with norm = none, which is the paper's network, and those of `vgg16_bn` with norm = batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmed.models.norms import Norm, norm_layer
from fedmed.models.spatial import require_size

BLOCKS = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels of every convolution, in widths
GRID = 7  # side of the feature maps that the dense layers read: 224 / 32


def vgg16(*, in_channels: int = 3, outputs: int = 1000, norm: Norm = "none", width: int = 0) -> nn.Module:
    """Returns VGG-16 with `outputs` logits.

    Takes images (N, in_channels, H, W) of at least 32 x 32 pixels and returns logits (N, outputs). Images of other
    than the paper's 224 x 224 pixels are averaged to the 7 x 7 feature maps that the dense layers read. Stages for
    fine-tuning: block1 block2 block3 block4 block5 dense head.

    Args:
        in_channels: Channels of an image.
        outputs: Number of labels; the paper's ImageNet has 1000.
        norm: `none` is the paper's; any other stands between every convolution and its ReLU.
        width: Channels of the first block; 0 = the paper's 64, with 64 * width units in each dense layer.
    """
    return VGG16(in_channels=in_channels, outputs=outputs, norm=norm, width=width or 64)


class VGG16(nn.Module):
    """Thirteen convolutions in five blocks, each block ended by a pooling, and three dense layers with dropout."""

    def __init__(self, *, in_channels: int, outputs: int, norm: Norm, width: int) -> None:
        """Builds and initializes the network."""
        super().__init__()
        layers: list[nn.Module] = []
        prefixes: dict[str, tuple[str, ...]] = {}
        channels = in_channels
        for number, block in enumerate(BLOCKS, start=1):
            start = len(layers)
            for multiple in block:
                layers.append(nn.Conv2d(channels, multiple * width, kernel_size=3, padding=1))
                if norm != "none":  # no placeholder, since it would shift torchvision's numbers
                    layers.append(norm_layer(norm, multiple * width))
                layers.append(nn.ReLU())
                channels = multiple * width
            layers.append(nn.MaxPool2d(2))
            prefixes[f"block{number}"] = tuple(f"features.{place}." for place in range(start, len(layers)))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(GRID)
        dense = 64 * width
        self.classifier = nn.Sequential(
            nn.Linear(GRID * GRID * channels, dense),
            nn.ReLU(),
            nn.Dropout(0.5),  # section 3.1
            nn.Linear(dense, dense),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(dense, outputs),
        )
        tail = {"dense": ("classifier.0.", "classifier.3."), "head": ("classifier.6.",)}
        self.stage_prefixes: Mapping[str, tuple[str, ...]] = {**prefixes, **tail}
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs) for images (N, in_channels, H, W)."""
        require_size("vgg16", images, 32)  # five poolings by two
        features = self.features(images)  # (N, 512, H/32, W/32)
        grid = torch.flatten(self.avgpool(features), 1)  # (N, 512 * 7 * 7)
        logits: Tensor = self.classifier(grid)  # (N, outputs)
        return logits


def initialize(network: nn.Module) -> None:
    """Draws weights as torchvision does, from torch's global generator.

    The paper's N(0, 0.01²) for all layers needed a shallower network to start from (section 3.1); He et al. 2015 showed
    how to draw convolutions without one.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
