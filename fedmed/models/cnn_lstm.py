"""A classifier of slice sequences: CNN features of each slice of a CT or MR series, read by an LSTM both ways.

The pattern of Donahue et al. 2015, "Long-term Recurrent Convolutional Networks" (arXiv:1411.4389), figure 2, with the
small classifier's CNN; reading a series in both directions is Schuster & Paliwal 1997. The CNN is written with
1 x 3 x 3 convolutions over the whole series, not as a 2D network over N · D slices: a series is one example, and hooks
for per-sample gradients would take its slices for D of them. A normalization therefore looks at a whole series at once
(`batch` at all series of the batch, as it would over slices), which keeps how much brighter one slice is than another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmed.errors import ModelError
from fedmed.models.norms import Norm, norm_layer
from fedmed.models.spatial import require_size


def cnn_lstm(
    *, in_channels: int = 1, outputs: int = 2, norm: Norm = "group", width: int = 0, dimensions: int = 3
) -> nn.Module:
    """Returns a classifier of series.

    Takes series (N, in_channels, D, H, W) of D >= 2 slices of at least 8 x 8 pixels, D as the data have it, and
    returns logits (N, outputs).

    Args:
        in_channels: Channels of a slice.
        outputs: Number of labels.
        norm: Normalization after each convolution.
        width: Channels of the first block, doubled by each following one; 0 = 16. The LSTM has 8 * width units.
        dimensions: 3; a single image is no sequence.

    Raises:
        ModelError: If `dimensions` is not 3.
    """
    if dimensions != 3:
        raise ModelError("cnn-lstm reads a series of slices; set data.items = volumes, or choose a network for images")
    return CNNLSTM(in_channels=in_channels, outputs=outputs, norm=norm, width=width or 16)


class CNNLSTM(nn.Module):
    """Four blocks on every slice, mean over the slice, an LSTM in each direction, linear classifier."""

    def __init__(self, *, in_channels: int, outputs: int, norm: Norm, width: int) -> None:
        """Builds and initializes the network."""
        super().__init__()
        self.block1 = block(in_channels, width, norm)
        self.block2 = block(width, 2 * width, norm)
        self.block3 = block(2 * width, 4 * width, norm)
        self.block4 = block(4 * width, 8 * width, norm)
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.forwards = LSTM(8 * width, 8 * width)
        self.backwards = LSTM(8 * width, 8 * width)
        self.classifier = nn.Linear(16 * width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015, as a ReLU follows
        nn.init.zeros_(self.classifier.bias)

    def forward(self, series: Tensor) -> Tensor:
        """Returns logits (N, outputs) for series (N, in_channels, D, H, W)."""
        require_size("cnn-lstm", series, 2, dimensions=3)
        if min(series.shape[3:]) < 8:
            raise ModelError("cnn-lstm needs slices of at least 8 x 8 pixels; raise data.volume-size")
        features = self.pool(self.block1(series))  # (N, 16, D, H/2, W/2)
        features = self.pool(self.block2(features))  # (N, 32, D, H/4, W/4)
        features = self.pool(self.block3(features))  # (N, 64, D, H/8, W/8)
        features = self.block4(features)  # (N, 128, D, H/8, W/8)
        sequence = features.mean(dim=(3, 4)).transpose(1, 2)  # (N, D, 128)
        ends = self.forwards(sequence), self.backwards(sequence.flip(1))  # (N, 128) each
        logits: Tensor = self.classifier(torch.cat(ends, dim=1))  # (N, outputs)
        return logits


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    c = σ(f) c + σ(i) tanh(g),  h = σ(o) tanh(c),  (i, f, g, o) = W x + U h + b.

    Written with linear layers, because torch's nn.LSTM is one fused operation: Opacus' hooks refuse it, and
    torch.func.vmap runs it image by image.
    """

    def __init__(self, features: int, units: int) -> None:
        """Reads `features` numbers a step and remembers `units`."""
        super().__init__()
        self.of_input = nn.Linear(features, 4 * units)  # W, b
        self.of_memory = nn.Linear(units, 4 * units, bias=False)  # U
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)
        with torch.no_grad():
            self.of_input.bias[units : 2 * units] = 1.0  # remember at first: Józefowicz et al. 2015

    def forward(self, sequence: Tensor) -> Tensor:
        """Returns h (N, units) after the last step of a sequence (N, steps, features)."""
        inputs = self.of_input(sequence)  # (N, steps, 4 units): all steps in one product
        enter, _, new, leave = inputs[:, 0].chunk(4, dim=1)  # h and c are zero before the first step
        cell = torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        for step in range(1, sequence.shape[1]):
            gates = inputs[:, step] + self.of_memory(hidden)
            enter, forget, new, leave = gates.chunk(4, dim=1)  # (N, units) each
            cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
            hidden = torch.sigmoid(leave) * torch.tanh(cell)
        return hidden


def block(channels: int, outputs: int, norm: Norm) -> nn.Sequential:
    """Returns a 3 x 3 convolution of every slice, a normalization and a ReLU: (N, C, …) -> (N, outputs, …)."""
    return nn.Sequential(
        nn.Conv3d(channels, outputs, kernel_size=(1, 3, 3), padding=(0, 1, 1), bias=norm == "none"),
        norm_layer(norm, outputs, dimensions=3),
        nn.ReLU(),
    )
