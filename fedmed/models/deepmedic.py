"""DeepMedic, the eleven-layer network of two pathways, for volumes and for images.

Kamnitsas et al. 2017, "Efficient multi-scale 3D CNN with fully connected CRF for accurate brain lesion segmentation"
(arXiv:1603.05959), sections 2.3 and 2.4. The normal pathway sees every voxel of a neighbourhood of 17³; the
low-resolution pathway sees one of 51³, averaged over cells of 3³. Each is eight 3³ convolutions without padding, so
that a segment of 25³ voxels (with its context of 57³) gives 9³ predictions. Then come two layers and the classifier, of
1³ convolutions. Residual connections came a year later: Kamnitsas et al. 2016, "DeepMedic for Brain Tumor Segmentation"
(BrainLes 2016); `residual` adds them. As in the authors' program, the order within a layer is
normalization, PReLU, convolution. The conditional random field is not here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.models.norms import Norm, norm_layer
from fedmed.models.spatial import CONVOLUTIONS, cropped, require_size, window

CHANNELS = (30, 30, 40, 40, 40, 40, 50, 50)  # of the eight convolutions of a pathway
DENSE = 150  # channels of the two layers that read both pathways
FACTOR = 3  # how much coarser the low-resolution pathway is
MARGIN = len(CHANNELS)  # voxels that eight 3³ convolutions take from each side
CONTEXT = FACTOR * MARGIN  # voxels around a segment that its predictions depend on
SURROUNDINGS = CONTEXT + FACTOR - 1  # those, and what fills up the last cell of a segment of any size


def deepmedic(
    *,
    in_channels: int = 1,
    outputs: int = 2,
    norm: Norm = "batch",
    width: int = 0,
    dimensions: int = 3,
    residual: bool = False,
    context: bool = False,
) -> nn.Module:
    """Returns DeepMedic with one logit per label and voxel.

    Takes images (N, in_channels, [D,] H, W) of any size and returns logits (N, outputs, [D,] H, W): the context that
    the paper's unpadded convolutions need is filled with zeros (the background of preprocessed images). With `context`
    it is not: images are boxes with the 26 voxels of their volume on every side that `margin_voxels` asks for, and the
    logits are those of the box. Tiles so predicted are a volume predicted at once, where 3 divides their corners, since
    the low-resolution pathway's cells begin there. See `DeepMedic.segment` for the paper's own form.

    Args:
        in_channels: Channels of an image, such as the sequences of an MR study.
        outputs: Number of labels.
        norm: `batch` is the paper's.
        width: Channels of the first layer; 0 = the paper's 30. The other layers keep their proportion to it.
        dimensions: 3 is the paper's; 2 for images.
        residual: Whether layers 4, 6, 8 and 10 add what the layer before them was given, as in 2016.
        context: Whether images come with what lies around them.
    """
    return DeepMedic(
        in_channels=in_channels,
        outputs=outputs,
        norm=norm,
        channels=tuple(scaled(count, width) for count in CHANNELS),
        dense=scaled(DENSE, width),
        dimensions=dimensions,
        residual=residual,
        margin_voxels=SURROUNDINGS if context else 0,
    )


def scaled(channels: int, width: int) -> int:
    """Returns `channels` of the paper for a first layer of `width` instead of 30 channels; 0 = as in the paper."""
    return max(1, round(channels * width / CHANNELS[0])) if width else channels


class DeepMedic(nn.Module):
    """Two pathways of eight convolutions, then two layers and a classifier that read both."""

    def __init__(
        self,
        *,
        in_channels: int,
        outputs: int,
        norm: Norm,
        channels: tuple[int, ...],
        dense: int,
        dimensions: int,
        residual: bool,
        margin_voxels: int,
    ) -> None:
        """Builds and initializes the network."""
        super().__init__()
        self.dimensions = dimensions
        self.margin_voxels = margin_voxels
        self.residual = residual
        self.normal = Pathway(in_channels, channels, norm, dimensions, residual=residual)
        self.low = Pathway(in_channels, channels, norm, dimensions, residual=residual)
        self.dense1 = layer(2 * channels[-1], dense, norm, dimensions, kernel=1)
        self.dense2 = layer(dense, dense, norm, dimensions, kernel=1, dropout=0.5)
        self.classifier = layer(dense, outputs, norm, dimensions, kernel=1, dropout=0.5, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.25)  # He et al. 2015, eq. 15, for PReLU that starts at 1/4
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs, [D,] H, W) for images (N, in_channels, [D,] H, W) and the margin around them."""
        margin = self.margin_voxels
        require_size("deepmedic", images, 1 + 2 * margin, self.dimensions)
        sides = tuple(side - 2 * margin for side in images.shape[2:])
        ends = [pad - margin for side in reversed(sides) for pad in (CONTEXT, CONTEXT + -side % FACTOR)]
        return cropped(self.segment(F.pad(images, ends)), sides)  # pads below 0 crop

    def segment(self, context: Tensor) -> Tensor:
        """Returns the paper's predictions: what can be said without padding.

        Args:
            context: (N, in_channels, [D,] H, W), sides of 48 + S voxels where 3 divides S; the paper's 57 has S = 9,
                and its normal-resolution segment is the 25³ in the middle.

        Returns:
            Logits (N, outputs, …) with sides of S, those of the voxels in the middle.
        """
        inner = window(context, [slice(CONTEXT - MARGIN, side - CONTEXT + MARGIN) for side in context.shape[2:]])
        normal = self.normal(inner)  # (N, 30 …, S + 16, …) -> (N, 50, S, S, S)
        coarse = F.avg_pool3d(context, FACTOR) if self.dimensions == 3 else F.avg_pool2d(context, FACTOR)
        low = self.low(coarse)  # (N, …, S/3 + 16, …) -> (N, 50, S/3, S/3, S/3)
        low = F.interpolate(low, scale_factor=FACTOR, mode="nearest")  # (N, 50, S, S, S)
        both = torch.cat((normal, low), dim=1)  # (N, 100, S, S, S)
        dense = self.dense2(self.dense1(both))  # (N, 150, S, S, S)
        if self.residual:
            dense = dense + fitted(both, dense)
        logits: Tensor = self.classifier(dense)  # (N, outputs, S, S, S)
        return logits


class Pathway(nn.Module):
    """Eight 3³ convolutions without padding: (N, C, …, S + 16) -> (N, 50, …, S)."""

    def __init__(
        self, in_channels: int, channels: tuple[int, ...], norm: Norm, dimensions: int, *, residual: bool
    ) -> None:
        """Reads images, or images at low resolution."""
        super().__init__()
        self.residual = residual
        self.first = CONVOLUTIONS[dimensions](in_channels, channels[0], kernel_size=3, bias=norm == "none")
        self.rest = nn.ModuleList(
            layer(before, after, norm, dimensions, kernel=3) for before, after in pairwise(channels)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns feature maps (N, 50, …) whose sides are 16 voxels shorter."""
        maps: list[Tensor] = [self.first(images)]  # outputs of layers 1, 2, 3, …
        for convolve in self.rest:
            new = convolve(maps[-1])
            if self.residual and len(maps) % 2 == 1 and len(maps) >= 3:  # layers 4, 6, 8; not 2, close to intensities
                new = new + fitted(maps[-2], new)
            maps.append(new)
        return maps[-1]


def fitted(earlier: Tensor, new: Tensor) -> Tensor:
    """Returns the middle of `earlier` in the size of `new`, with empty maps appended where `new` has more."""
    cut = (earlier.shape[2] - new.shape[2]) // 2
    middle = window(earlier, [slice(cut, side - cut) for side in earlier.shape[2:]])
    return F.pad(middle, (0, 0) * (new.dim() - 2) + (0, new.shape[1] - earlier.shape[1]))


def layer(
    channels: int, outputs: int, norm: Norm, dimensions: int, *, kernel: int, dropout: float = 0.0, bias: bool = False
) -> nn.Sequential:
    """Returns normalization, PReLU, dropout (if any) and an unpadded convolution: (N, C, …) -> (N, outputs, …)."""
    convolution = CONVOLUTIONS[dimensions](channels, outputs, kernel_size=kernel, bias=bias or norm == "none")
    before = [norm_layer(norm, channels, dimensions), nn.PReLU(channels)]
    return nn.Sequential(*before, *([nn.Dropout(dropout)] if dropout else []), convolution)
