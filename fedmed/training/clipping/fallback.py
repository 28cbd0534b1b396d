"""Any other layer: it is run patient by patient, each with parameters of its own that share their memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmed.errors import ModelError
from fedmed.training.clipping.recording import Recording

Copies = list[dict[str, Tensor]]  # of every patient, the layer's parameters by name


def one_by_one(name: str, module: nn.Module, recording: Recording, *given: Any, **named: Any) -> Any:
    """What the module returns, computed for one patient after the other; their gradients go to the recording.

    Right for every layer that treats its rows apart, at the cost of one small pass for every patient. The layer must
    take and return tensors, tuples, lists and dicts whose first axis is the images.
    """
    first = next((value for value in (*given, *named.values()) if isinstance(value, Tensor)), None)
    if first is None:
        raise ModelError(f"layer {name} takes no tensor, so its gradient cannot be told apart by patient")
    trained = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
    recording.use(name, first, *trained.values())
    patients = recording.patients
    apart = _Apart(module)
    copies = [{key: p.detach().requires_grad_() for key, p in trained.items()} for _ in patients.names]
    outputs = []
    for own, rows in zip(copies, patients.each(), strict=True):
        cut = partial(_cut, name, recording.images, rows)
        own = {f"inner.{key}": value for key, value in own.items()}
        outputs.append(functional_call(apart, own, cut(given), cut(named)))
    recording.ends.append(partial(_collect, recording, trained, copies))
    return _joined(outputs, 0, 1 if isinstance(module, nn.RNNBase) else 0)  # of which states are (layers, n, units)


class _Apart(nn.Module):
    """A module by its class's own forward pass, which the recording has replaced on the module itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **named: Any) -> Any:
        return type(self.inner).forward(self.inner, *given, **named)


def _collect(recording: Recording, trained: dict[str, nn.Parameter], copies: Copies) -> None:
    for key, parameter in trained.items():
        own = [copy[key] for copy in copies]
        recording.keep(parameter, torch.stack([c.grad if c.grad is not None else torch.zeros_like(c) for c in own]))


def _cut(name: str, images: int, rows: slice, value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim():
        if len(value) != images:
            raise ModelError(
                f"layer {name} was given {len(value)} rows for {images} images, and cannot be run patient by patient"
            )
        return value[rows]
    if isinstance(value, tuple | list):
        return type(value)(_cut(name, images, rows, part) for part in value)
    if isinstance(value, dict):
        return {key: _cut(name, images, rows, part) for key, part in value.items()}
    return value


def _joined(values: list[Any], axis: int, later: int) -> Any:
    """One value out of the patients', tensors along `axis`; in a tuple, what follows the first along `later`."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values, dim=axis)
    if isinstance(first, tuple | list):
        parts = [list(part) for part in zip(*values, strict=True)]
        return type(first)(_joined(part, later if place else axis, later) for place, part in enumerate(parts))
    if isinstance(first, dict):
        return {key: _joined([value[key] for value in values], axis, later) for key in first}
    return first
