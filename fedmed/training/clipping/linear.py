"""Linear layers, also over the steps of a sequence, and read again at every step."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError
from fedmed.training.clipping.patients import Patients
from fedmed.training.clipping.recording import Recording, full, quiet
from fedmed.training.clipping.rounding import scaled, squares_above

MOVE = 12.0  # as in `convolutions`


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
    patients, size, steps = recording.patients, weight.numel(), inputs.shape[1]
    gram = sum(block.patients * (block.images * steps) ** 2 for block in patients.blocks) * sum(weight.shape)
    gram += len(inputs) * steps * size  # the weighted sum
    kept = len(inputs) * steps * size + 3 * MOVE * len(patients.names) * size
    if recording.uses[weight] > len(uses) or kept < gram:  # read by something else as well, or many steps
        recording.keep(weight, gradients(inputs, gradient, patients))
    else:
        recording.postpone(weight, squares(inputs, gradient, patients), partial(weighted, inputs, gradient))


def gradients(inputs: Tensor, gradient: Tensor, patients: Patients) -> Tensor:
    """(Q, outputs, features) the weight gradient of every patient, for (n, T, features) and (n, T, outputs)."""
    found = []
    for block in patients.blocks:
        x, g = (full(rows[block.rows]).reshape(block.patients, -1, rows.shape[2]) for rows in (inputs, gradient))
        found.append(torch.bmm(g.transpose(1, 2), x))
    return torch.cat(found)


def squares(inputs: Tensor, gradient: Tensor, patients: Patients) -> Tensor:
    """(Q,) squared norms of the weight gradients, rounded up: ⟨X Xᵀ, G Gᵀ⟩ (one step: Goodfellow 2015, 1510.01799)."""
    found = []
    for block in patients.blocks:
        x, g = (full(rows[block.rows]).reshape(block.patients, -1, rows.shape[2]) for rows in (inputs, gradient))
        (x, size_of_x), (g, size_of_g) = scaled(x), scaled(g)
        pairs = torch.bmm(x, x.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
        found.append(squares_above(*pairs, depths=(x.shape[2], g.shape[2])) * (size_of_x * size_of_g) ** 2)
    return torch.cat(found)


def weighted(inputs: Tensor, gradient: Tensor, factors: Tensor, silent: Tensor | None) -> Tensor:
    """Σ_i factor_i · G_i for factors (n,); silent rows count as 0."""
    inputs, gradient = quiet(full(inputs), silent), quiet(full(gradient), silent)
    return (gradient * factors[:, None, None]).flatten(0, 1).t() @ inputs.flatten(0, 1)
