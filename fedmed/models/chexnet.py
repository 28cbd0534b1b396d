"""DenseNet-121, the network of CheXNet.

Huang et al. 2017, "Densely Connected Convolutional Networks" (arXiv:1608.06993), table 1, DenseNet-BC, k = 32;
Rajpurkar et al. 2017, "CheXNet" (arXiv:1711.05225): one output per finding. Parameters have torchvision's names, so its
weights load as they are. Unlike torchvision's, no operation works in place: per-sample gradients need the activations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.models.norms import Norm, norm_layer
from fedmed.models.spatial import require_size

LAYERS = (6, 12, 24, 16)  # dense layers of the four blocks


def chexnet(*, in_channels: int = 3, outputs: int = 14, norm: Norm = "batch", width: int = 0) -> nn.Module:
    """Returns DenseNet-121 with logits for `outputs` findings.

    Takes images (N, in_channels, H, W) of at least 29 x 29 pixels (61 x 61 with `instance`, which cannot normalize a
    single pixel) and returns logits (N, outputs), without the sigmoid. Stages for fine-tuning: stem block1 block2
    block3 block4 head.

    Args:
        in_channels: Channels of an image; the paper repeats the gray image three times.
        outputs: Number of findings; the paper's ChestX-ray14 has 14.
        norm: `batch` is the paper's.
        width: Growth rate, with 2 * width channels at the stem; 0 = the paper's 32 and 64.
    """
    return CheXNet(in_channels=in_channels, outputs=outputs, norm=norm, growth=width or 32)


class CheXNet(nn.Module):
    """Stem, four dense blocks with three transitions between them, global mean, linear classifier."""

    def __init__(self, *, in_channels: int, outputs: int, norm: Norm, growth: int) -> None:
        """Builds and initializes the network; k = `growth`."""
        super().__init__()
        self.smallest = 61 if norm == "instance" else 29
        channels = 2 * growth
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=norm == "none"),
            norm0=norm_layer(norm, channels),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        for number, layers in enumerate(LAYERS, start=1):
            stages[f"denseblock{number}"] = dense_block(layers, channels, growth, norm)
            channels = channels + layers * growth
            if number < len(LAYERS):
                stages[f"transition{number}"] = transition(channels, norm)
                channels = channels // 2
        stages["norm5"] = norm_layer(norm, channels)
        self.features = nn.Sequential(stages)
        self.classifier = nn.Linear(channels, outputs)
        self.stage_prefixes: Mapping[str, tuple[str, ...]] = {
            "stem": ("features.conv0.", "features.norm0."),
            **{f"block{n}": (f"features.denseblock{n}.", f"features.transition{n}.") for n in range(1, len(LAYERS))},
            "block4": ("features.denseblock4.", "features.norm5."),
            "head": ("classifier.",),
        }
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs) for images (N, in_channels, H, W)."""
        require_size("chexnet", images, self.smallest)
        features = torch.relu(self.features(images))  # (N, 1024, H/32, W/32)
        pooled = features.mean(dim=(2, 3))  # (N, 1024)
        logits: Tensor = self.classifier(pooled)  # (N, outputs)
        return logits


def dense_block(layers: int, channels: int, growth: int, norm: Norm) -> nn.Sequential:
    """Returns layers in a row, each reading all feature maps before it: (N, C, H, W) -> (N, C + layers k, H, W)."""
    return nn.Sequential(
        OrderedDict((f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth, norm)) for i in range(layers))
    )


class DenseLayer(nn.Module):
    """Appends k = `growth` new feature maps to those it is given, through a bottleneck of 4 k maps."""

    def __init__(self, channels: int, growth: int, norm: Norm) -> None:
        """Reads `channels` feature maps."""
        super().__init__()
        self.norm1 = norm_layer(norm, channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, kernel_size=1, bias=norm == "none")
        self.norm2 = norm_layer(norm, 4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=norm == "none")

    def forward(self, features: Tensor) -> Tensor:
        """Returns (N, C + k, H, W) for features (N, C, H, W)."""
        bottleneck = self.conv1(F.relu(self.norm1(features)))  # (N, 4 k, H, W)
        new = self.conv2(F.relu(self.norm2(bottleneck)))  # (N, k, H, W)
        # Appending to one growing tensor copies what torchvision's list of features copies, with far fewer gradients
        # to add up on the way back.
        return torch.cat((features, new), dim=1)  # (N, C + k, H, W)


def transition(channels: int, norm: Norm) -> nn.Sequential:
    """Returns a layer that halves channels, height and width: (N, C, H, W) -> (N, C/2, H/2, W/2)."""
    return nn.Sequential(
        OrderedDict(
            norm=norm_layer(norm, channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels, channels // 2, kernel_size=1, bias=norm == "none"),
            pool=nn.AvgPool2d(kernel_size=2, stride=2),
        )
    )


def initialize(network: nn.Module) -> None:
    """Draws He-normal convolutions and zeroes biases, as torchvision does, from torch's global generator."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
