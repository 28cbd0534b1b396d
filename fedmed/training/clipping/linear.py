"""Linear layers, also over the steps of a sequence, and read again at every step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError
from fedmed.training.clipping.patients import Block
from fedmed.training.clipping.recording import Recording, full, quiet
from fedmed.training.clipping.rounding import scaled, squares_above

MOVE = 12.0  # multiply-adds of a matrix product in the time that one number of a kept gradient is written or read


def linear(name: str, module: nn.Linear, recording: Recording, inputs: Tensor) -> Tensor:
    """What a linear layer returns for inputs (n, …, features); its gradients go to the recording."""
    return product(name, recording, inputs, cast(nn.Parameter, module.weight), module.bias)


def product(name: str, recording: Recording, inputs: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
    """W x + b for inputs (n, …, features)."""
    recording.use(name, inputs, weight, bias)
    output = F.linear(inputs, weight.detach(), None if bias is None else bias.detach())
    return recording.watch(output, partial(_received, name, recording, [inputs, inputs._version], weight, bias))


def _received(
    name: str,
    recording: Recording,
    given: list[Tensor | int],
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    gradient: Tensor,
) -> None:
    inputs, version = given
    given.clear()
    if not isinstance(inputs, Tensor) or inputs._version != version:
        raise ModelError(f"what layer {name} was given was changed in place; make that operation return a new tensor")
    images = len(gradient)
    gradient = gradient.reshape(images, -1, gradient.shape[-1])  # (n, T, outputs)
    if bias is not None and bias.requires_grad:
        recording.add_rows(bias, full(gradient).sum(1))
    if weight.requires_grad:
        inputs = inputs.to(gradient.dtype).reshape(images, -1, inputs.shape[-1])  # (n, T, features)
        recording.add_product(weight, inputs, gradient, partial(reckon, recording, weight))


def reckon(recording: Recording, weight: nn.Parameter, uses: list[tuple[Tensor, Tensor]]) -> None:
    """Hand in the per-patient gradients of a weight that linear layers read, given all uses of a batch."""
    inputs, gradient = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*uses, strict=True))
    shared = recording.uses[weight] > len(uses)  # something else reads the weight as well
    few, many = recording.patients.parted(0 if shared else most_by_gram(inputs.shape[1], *weight.shape))
    if many:
        recording.keep(weight, gradients(inputs, gradient, many))
    if few:
        rows = few[-1].rows.stop
        postponed = partial(weighted, inputs[:rows], gradient[:rows])
        recording.postpone(weight, squares(inputs, gradient, few), postponed, rows=rows)


def most_by_gram(steps: int, outputs: int, features: int) -> float:
    """How many images a patient may have whose norm takes less time by `squares`, as in `convolutions`.

    (k T)² (outputs + features) = 3 MOVE · outputs · features for k images where the gradient itself takes as long.
    """
    return sqrt(3 * MOVE * outputs * features / (outputs + features)) / steps


def gradients(inputs: Tensor, gradient: Tensor, blocks: Sequence[Block]) -> Tensor:
    """(patients, outputs, features) the weight gradient of each, for (n, T, features) and (n, T, outputs)."""
    found = []
    for block in blocks:
        x, g = (full(rows[block.rows]).reshape(block.patients, -1, rows.shape[2]) for rows in (inputs, gradient))
        found.append(torch.bmm(g.transpose(1, 2), x))
    return torch.cat(found)


def squares(inputs: Tensor, gradient: Tensor, blocks: Sequence[Block]) -> Tensor:
    """(patients,) squared norms of the same, rounded up: ⟨X Xᵀ, G Gᵀ⟩ (one step: Goodfellow 2015, 1510.01799)."""
    found = []
    for block in blocks:
        x, g = (full(rows[block.rows]).reshape(block.patients, -1, rows.shape[2]) for rows in (inputs, gradient))
        (x, size_of_x), (g, size_of_g) = scaled(x), scaled(g)
        pairs = torch.bmm(x, x.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
        found.append(squares_above(*pairs, depths=(x.shape[2], g.shape[2])) * (size_of_x * size_of_g) ** 2)
    return torch.cat(found)


def weighted(inputs: Tensor, gradient: Tensor, factors: Tensor, silent: Tensor | None) -> Tensor:
    """Σ_i factor_i · G_i for factors (n,); silent rows count as 0."""
    inputs, gradient = quiet(full(inputs), silent), quiet(full(gradient), silent)
    return (gradient * factors[:, None, None]).flatten(0, 1).t() @ inputs.flatten(0, 1)
