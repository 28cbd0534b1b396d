"""ResNet-50.

He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1 and figure 5 (right).
Parameters have torchvision's names, so its weights load as they are, and as there the 3 x 3 convolution of a bottleneck
halves the size, not the first 1 x 1 one ("v1.5"). Unlike torchvision's, no operation works in place: its `out +=
identity` breaks per-sample gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.models.norms import Norm, norm_layer
from fedmed.models.spatial import require_size

BLOCKS = (3, 4, 6, 3)  # bottlenecks of the four layers
EXPANSION = 4  # a bottleneck's output has four times the channels of its 3 x 3 convolution


def resnet50(*, in_channels: int = 3, outputs: int = 1000, norm: Norm = "batch", width: int = 0) -> nn.Module:
    """Returns ResNet-50 with `outputs` logits.

    Takes images (N, in_channels, H, W) of any size (at least 33 x 33 pixels with `instance`, which cannot normalize a
    single pixel) and returns logits (N, outputs). Stages for fine-tuning: stem layer1 layer2 layer3 layer4 head.

    Args:
        in_channels: Channels of an image.
        outputs: Number of labels; the paper's ImageNet has 1000.
        norm: `batch` is the paper's.
        width: Channels of the stem; 0 = the paper's 64, which makes 2048 at the end.
    """
    return ResNet50(in_channels=in_channels, outputs=outputs, norm=norm, width=width or 64)


class ResNet50(nn.Module):
    """Stem, four layers of bottlenecks, global mean, linear classifier."""

    def __init__(self, *, in_channels: int, outputs: int, norm: Norm, width: int) -> None:
        """Builds and initializes the network."""
        super().__init__()
        self.smallest = 33 if norm == "instance" else 1
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=norm == "none")
        self.bn1 = norm_layer(norm, width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = layer(BLOCKS[0], width, width, norm, stride=1)
        self.layer2 = layer(BLOCKS[1], 4 * width, 2 * width, norm, stride=2)
        self.layer3 = layer(BLOCKS[2], 8 * width, 4 * width, norm, stride=2)
        self.layer4 = layer(BLOCKS[3], 16 * width, 8 * width, norm, stride=2)
        self.fc = nn.Linear(32 * width, outputs)
        self.stage_prefixes: Mapping[str, tuple[str, ...]] = {
            "stem": ("conv1.", "bn1."),
            **{f"layer{number}": (f"layer{number}.",) for number in range(1, 5)},
            "head": ("fc.",),
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs) for images (N, in_channels, H, W)."""
        require_size("resnet50", images, self.smallest)
        features = self.maxpool(F.relu(self.bn1(self.conv1(images))))  # (N, 64, H/4, W/4)
        features = self.layer1(features)  # (N, 256, H/4, W/4)
        features = self.layer2(features)  # (N, 512, H/8, W/8)
        features = self.layer3(features)  # (N, 1024, H/16, W/16)
        features = self.layer4(features)  # (N, 2048, H/32, W/32)
        pooled = features.mean(dim=(2, 3))  # (N, 2048)
        logits: Tensor = self.fc(pooled)  # (N, outputs)
        return logits


def layer(blocks: int, channels: int, inner: int, norm: Norm, *, stride: int) -> nn.Sequential:
    """Returns bottlenecks in a row, the first of which changes channels and size: (N, C, …) -> (N, 4 inner, …)."""
    rest = (Bottleneck(EXPANSION * inner, inner, norm, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(channels, inner, norm, stride=stride), *rest)


class Bottleneck(nn.Module):
    """y = ReLU(F(x) + W x): F narrows, convolves 3 x 3 and widens; W is the identity where the shapes agree (eq. 2)."""

    def __init__(self, channels: int, inner: int, norm: Norm, *, stride: int) -> None:
        """Reads `channels` feature maps and makes 4 * `inner`."""
        super().__init__()
        bias, outputs = norm == "none", EXPANSION * inner
        self.conv1 = nn.Conv2d(channels, inner, kernel_size=1, bias=bias)
        self.bn1 = norm_layer(norm, inner)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1, bias=bias)
        self.bn2 = norm_layer(norm, inner)
        self.conv3 = nn.Conv2d(inner, outputs, kernel_size=1, bias=bias)
        self.bn3 = norm_layer(norm, outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != outputs:
            projection = nn.Conv2d(channels, outputs, kernel_size=1, stride=stride, bias=bias)
            self.downsample = nn.Sequential(projection, norm_layer(norm, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Returns (N, 4 inner, H/stride, W/stride) for features (N, C, H, W)."""
        new = F.relu(self.bn1(self.conv1(features)))  # (N, inner, H, W)
        new = F.relu(self.bn2(self.conv2(new)))  # (N, inner, H/stride, W/stride)
        new = self.bn3(self.conv3(new))  # (N, 4 inner, H/stride, W/stride)
        return F.relu(new + self.downsample(features))
