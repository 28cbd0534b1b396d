"""A small classifier for tests, demos and small hospitals: about 98,000 parameters in 2D."""

from __future__ import annotations

from torch import Tensor, nn

from fedmed.models.norms import Norm, norm_layer
from fedmed.models.spatial import CONVOLUTIONS, require_size


def small_cnn(
    *, in_channels: int = 1, outputs: int = 2, norm: Norm = "group", width: int = 0, dimensions: int = 2
) -> nn.Module:
    """Returns four blocks of convolution, normalization and ReLU, with a pooling after each of the first three.

    Takes images (N, in_channels, [D,] H, W) of at least 8 pixels a side (16 with `instance`, which cannot normalize a
    single pixel) and returns logits (N, outputs).

    Args:
        in_channels: Channels of an image.
        outputs: Number of labels.
        norm: Normalization after each convolution.
        width: Channels of the first block, doubled by each following one; 0 = 16.
        dimensions: 2 for images, 3 for volumes.
    """
    return SmallCNN(in_channels=in_channels, outputs=outputs, norm=norm, width=width or 16, dimensions=dimensions)


class SmallCNN(nn.Module):
    """Four blocks, global mean, linear classifier."""

    def __init__(self, *, in_channels: int, outputs: int, norm: Norm, width: int, dimensions: int) -> None:
        """Builds and initializes the network."""
        super().__init__()
        self.dimensions = dimensions
        self.smallest = 16 if norm == "instance" else 8
        self.block1 = block(in_channels, width, norm, dimensions)
        self.block2 = block(width, 2 * width, norm, dimensions)
        self.block3 = block(2 * width, 4 * width, norm, dimensions)
        self.block4 = block(4 * width, 8 * width, norm, dimensions)
        self.pool = nn.MaxPool2d(2) if dimensions == 2 else nn.MaxPool3d(2)
        self.classifier = nn.Linear(8 * width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015, as a ReLU follows
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs) for images (N, in_channels, [D,] H, W)."""
        require_size("small-cnn", images, self.smallest, self.dimensions)
        features = self.pool(self.block1(images))  # (N, 16, H/2, W/2)
        features = self.pool(self.block2(features))  # (N, 32, H/4, W/4)
        features = self.pool(self.block3(features))  # (N, 64, H/8, W/8)
        features = self.block4(features)  # (N, 128, H/8, W/8)
        pooled = features.flatten(2).mean(dim=2)  # (N, 128)
        logits: Tensor = self.classifier(pooled)  # (N, outputs)
        return logits


def block(channels: int, outputs: int, norm: Norm, dimensions: int = 2) -> nn.Sequential:
    """Returns a 3 x 3 convolution, its normalization and a ReLU: (N, channels, …) -> (N, outputs, …)."""
    convolution = CONVOLUTIONS[dimensions](channels, outputs, kernel_size=3, padding=1, bias=norm == "none")
    return nn.Sequential(convolution, norm_layer(norm, outputs, dimensions), nn.ReLU())
