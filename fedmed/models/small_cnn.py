"""A small classifier for tests, demos and small hospitals: about 98,000 parameters."""

from __future__ import annotations

from torch import Tensor, nn

from fedmed.models.norms import Norm, norm_layer, require_size


def small_cnn(*, in_channels: int = 1, outputs: int = 2, norm: Norm = "group", width: int = 0) -> nn.Module:
    """Returns four blocks of convolution, normalization and ReLU, with a pooling after each of the first three.

    Takes images (N, in_channels, H, W) of at least 8 x 8 pixels (16 x 16 with `instance`, which cannot normalize a
    single pixel) and returns logits (N, outputs).

    Args:
        in_channels: Channels of an image.
        outputs: Number of labels.
        norm: Normalization after each convolution.
        width: Channels of the first block, doubled by each following one; 0 = 16.
    """
    return SmallCNN(in_channels=in_channels, outputs=outputs, norm=norm, width=width or 16)


class SmallCNN(nn.Module):
    """Four blocks, global mean, linear classifier."""

    def __init__(self, *, in_channels: int, outputs: int, norm: Norm, width: int) -> None:
        """Builds and initializes the network."""
        super().__init__()
        self.smallest = 16 if norm == "instance" else 8
        self.block1 = block(in_channels, width, norm)
        self.block2 = block(width, 2 * width, norm)
        self.block3 = block(2 * width, 4 * width, norm)
        self.block4 = block(4 * width, 8 * width, norm)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(8 * width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015, as a ReLU follows
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs) for images (N, in_channels, H, W)."""
        require_size("small-cnn", images, self.smallest)
        features = self.pool(self.block1(images))  # (N, 16, H/2, W/2)
        features = self.pool(self.block2(features))  # (N, 32, H/4, W/4)
        features = self.pool(self.block3(features))  # (N, 64, H/8, W/8)
        features = self.block4(features)  # (N, 128, H/8, W/8)
        pooled = features.mean(dim=(2, 3))  # (N, 128)
        logits: Tensor = self.classifier(pooled)  # (N, outputs)
        return logits


def block(channels: int, outputs: int, norm: Norm) -> nn.Sequential:
    """Returns a 3 x 3 convolution, its normalization and a ReLU: (N, channels, H, W) -> (N, outputs, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, outputs, kernel_size=3, padding=1, bias=False), norm_layer(norm, outputs), nn.ReLU()
    )
