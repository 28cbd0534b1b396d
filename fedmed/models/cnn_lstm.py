"""A classifier of slice sequences: CNN features of each slice of a CT or MR series, read by an LSTM both ways.

The pattern of Donahue et al. 2015, "Long-term Recurrent Convolutional Networks" (arXiv:1411.4389), figure 2, with the
small classifier's CNN; reading a series in both directions is Schuster & Paliwal 1997. The CNN is written with
1 x 3 x 3 convolutions over the whole series, not as a 2D network over N · D slices: a series is one example, and hooks
for per-sample gradients would take its slices for D of them. A normalization therefore looks at a whole series at once
(`batch` at all series of the batch, as it would over slices), which keeps how much brighter one slice is than another.

Slices of zeros alone are no slices of the series: they fill it up to `data.volume-size`. The LSTM passes over them, and
normalizations see others of the series in their place, each as often as the number of slices allows.
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

    Takes series (N, in_channels, D, H, W) of D >= 2 slices of at least 8 x 8 pixels and returns logits (N, outputs).
    What it says of a shorter series, with zeros before and behind it, is what it says of the series.

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
        real = series.detach().abs().amax(dim=(1, 3, 4)) > 0  # (N, D)
        onwards, backwards, count = readings(real)
        steps = torch.arange(real.shape[1], device=series.device)
        series = along(series, torch.where(real, steps, onwards), 2)  # others in the place of padding
        features = self.pool(self.block1(series))  # (N, 16, D, H/2, W/2)
        features = self.pool(self.block2(features))  # (N, 32, D, H/4, W/4)
        features = self.pool(self.block3(features))  # (N, 64, D, H/8, W/8)
        features = self.block4(features)  # (N, 128, D, H/8, W/8)
        sequence = features.mean(dim=(3, 4)).transpose(1, 2)  # (N, D, 128)
        first, last = (along(sequence, order, 1) for order in (onwards, backwards))  # (N, D, 128) each
        ends = self.forwards(first, count), self.backwards(last, count)  # (N, 128) each
        logits: Tensor = self.classifier(torch.cat(ends, dim=1))  # (N, outputs)
        return logits


def readings(real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the places of real slices in order and in reverse, again and again; and how many there are.

    Args:
        real: (N, D), false for padding.

    Returns:
        Places (N, D), places (N, D), and numbers (N,), 1 for a series of padding alone.
    """
    places = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # real ones first
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    steps = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    return places.gather(1, steps % count), places.gather(1, (count - 1 - steps) % count), count[:, 0]


def along(values: Tensor, places: Tensor, axis: int) -> Tensor:
    """Returns the values (N, …) at the places (N, D) of an axis."""
    shape = [1] * values.dim()
    shape[0], shape[axis] = places.shape
    return values.gather(axis, places.reshape(shape).expand(values.shape))


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

    def forward(self, sequence: Tensor, count: Tensor) -> Tensor:
        """Returns h (N, units) after the first `count` (N,) steps of a sequence (N, steps, features), one at least."""
        inputs = self.of_input(sequence)  # (N, steps, 4 units): all steps in one product
        enter, _, new, leave = inputs[:, 0].chunk(4, dim=1)  # h and c are zero before the first step
        cell = torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        for step in range(1, sequence.shape[1]):
            gates = inputs[:, step] + self.of_memory(hidden)
            enter, forget, new, leave = gates.chunk(4, dim=1)  # (N, units) each
            cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
            hidden = torch.where(step < count[:, None], torch.sigmoid(leave) * torch.tanh(cell), hidden)
        return hidden


def block(channels: int, outputs: int, norm: Norm) -> nn.Sequential:
    """Returns a 3 x 3 convolution of every slice, a normalization and a ReLU: (N, C, …) -> (N, outputs, …)."""
    return nn.Sequential(
        nn.Conv3d(channels, outputs, kernel_size=(1, 3, 3), padding=(0, 1, 1), bias=norm == "none"),
        norm_layer(norm, outputs, dimensions=3),
        nn.ReLU(),
    )
