"""Convolutions and transposed convolutions: what they record, and in which form their gradients are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError
from fedmed.training.clipping import correlation
from fedmed.training.clipping.correlation import Window
from fedmed.training.clipping.recording import Recording, full

CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
# Time in multiply-adds of a large matrix product on one core; see docs/dp-engine.md.
PAIR = 60.0  # a pair of positions, for each pass over the square of all of them
KEPT = 100.0  # a number of a kept gradient: written, read for its norm, read for the sum
APART = 1.15  # a multiply-add of the patients' own weight gradients
ROOM = 3.0  # kept gradients may take so many times the memory of what the layer was given and got back


def most_by_gram(maps: tuple[int, ...], points: tuple[int, ...], window: Window) -> float:
    """How many images a patient may have whose norm takes less time in the form `gram`; with more it is `kept`.

    * `gram`: norms from products of positions with positions, and one weighted sum later. Cheap for small maps.
    * `kept`: every patient's gradient is computed and kept, unless that takes much memory. Cheap for few weights.

    The forms are rounded differently, so nothing but the layer's shapes and a patient's own images may choose: else
    who else is in the batch would move the norm (docs/privacy-model.md, claim 7).

    Where memory forbids `kept`, 3 k T (C + O) < C O K for k images of T positions and K taps, the products over
    positions, (k T)² (C + O), are under a third of those of the plain weight gradient: `gram` is never dear there.

    Args:
        maps: (C, *sides).
        points: (O, *sides).
        window: Of the convolution.
    """
    (channels, *sides), (outputs, *ends) = maps, points
    few, many, taps = prod(ends), prod(sides), prod(window.kernel)
    weights = outputs * channels * taps // window.groups
    pairs = few**2 * window.groups * PAIR
    if window.pointwise:
        square = few**2 * (channels + outputs) + 2 * pairs
    elif window.steps_by_one:
        square = many**2 * channels + few**2 * outputs + (2 + sum(window.kernel)) * pairs * max(1, many // few)
    else:
        square = few**2 * (channels * taps + outputs) + 2 * pairs
    more = (APART - 1) * few * weights  # of each image; k² square = k more + KEPT weights where both forms take as long
    equal = (more + sqrt(more**2 + 4 * square * KEPT * weights)) / (2 * square)
    return max(equal, (weights - 1) // (ROOM * (channels * many + outputs * few)))


@dataclass(frozen=True, kw_only=True)
class _Layer:
    name: str
    module: Any  # one of those of CONVOLVE
    window: Window
    ahead: tuple[int, ...]  # padding that is added before the convolution, as F.pad takes it
    convolve: Callable[..., Tensor]

    def convolved(self, recording: Recording, maps: Tensor, sizes: list[int] | None = None) -> Tensor:
        """What the module returns for `maps`; its gradients go to the recording."""
        module, window = self.module, self.window
        if maps.dim() != 2 + len(window.kernel):
            raise ModelError(f"layer {self.name} was given one image without an axis for the batch")
        recording.use(self.name, maps, module.weight, module.bias)
        if any(self.ahead):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            maps = F.pad(maps, self.ahead, mode=mode)
        bias = None if module.bias is None else module.bias.detach()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            last: tuple[object, ...] = (window.dilation, window.groups)
        else:
            extra = module._output_padding(
                maps,
                sizes,
                list(window.stride),
                list(window.padding),
                list(window.kernel),
                len(window.kernel),
                list(window.dilation),
            )
            last = (extra, window.groups, window.dilation)
        output = self.convolve(maps, module.weight.detach(), bias, window.stride, window.padding, *last)
        return recording.watch(output, partial(self._received, recording, [maps, maps._version]))

    def _received(self, recording: Recording, given: list[Tensor | int], gradient: Tensor) -> None:
        """Take the gradient of the output; `given`, the input and its version, is emptied to let its memory go."""
        maps, version = given
        given.clear()
        if not isinstance(maps, Tensor) or maps._version != version:
            raise ModelError(f"what layer {self.name} was given was changed in place; make that operation a new tensor")
        weight, bias = self.module.weight, self.module.bias
        if bias is not None and bias.requires_grad:
            recording.add_rows(bias, full(gradient).flatten(2).sum(2))
        if not weight.requires_grad:
            return
        if maps.dtype != gradient.dtype:  # autocast rounded it inside the convolution
            maps = maps.to(gradient.dtype)
        points = gradient
        if not isinstance(self.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            maps, points = points, maps
        window, patients = self.window, recording.patients
        most = most_by_gram(tuple(maps.shape[1:]), tuple(points.shape[1:]), window) if recording.single(weight) else 0
        few, many = patients.parted(most)
        if many:
            recording.keep(weight, correlation.gradients(maps, points, window, many))
        if few:
            squares = correlation.squares_by_gram(maps, points, window, few)
            rows = few[-1].rows.stop
            weighted = partial(correlation.weighted, maps[:rows], points[:rows], window)
            recording.postpone(weight, squares, weighted, rows=rows)


def convolution(name: str, module: nn.Module) -> Callable[..., Tensor]:
    """The forward pass of a convolution or transposed convolution, with the recording as its first argument."""
    kind = next(kind for kind in CONVOLVE if isinstance(module, kind))
    of: Any = module  # the six classes have no common base that torch names in public
    padding, ahead = of.padding, (0,) * (2 * len(of.kernel_size))
    if isinstance(padding, str) or of.padding_mode != "zeros":  # padded before: "same" may have an odd pixel to place
        padding, ahead = (0,) * len(of.kernel_size), tuple(of._reversed_padding_repeated_twice)
    window = Window(kernel=of.kernel_size, stride=of.stride, padding=padding, dilation=of.dilation, groups=of.groups)
    layer = _Layer(name=name, module=of, window=window, ahead=ahead, convolve=CONVOLVE[kind])
    return layer.convolved
