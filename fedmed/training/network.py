"""A network as two flat vectors: what travels, and what stays resident in a worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmed.config import ModelConfig, RunConfig
from fedmed.errors import ModelError
from fedmed.models import build, build_with_report, margin_of
from fedmed.types import Entry, FloatVector, Layout, Weights


def layout_of(module: nn.Module) -> Layout:
    """The flat layout of a network, in the order in which the module declares its tensors.

    Frozen parameters are buffers: nothing that changes or clips parameters may reach them.
    """
    trained, constant = _parted(module)
    return Layout(_entries(trained), _entries(constant))


def _parted(module: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(name, tensor) of what trains; and of what does not: frozen parameters, then buffers."""
    trained: list[tuple[str, Tensor]] = [(name, t) for name, t in module.named_parameters() if t.requires_grad]
    frozen = [(name, tensor.detach()) for name, tensor in module.named_parameters() if not tensor.requires_grad]
    return trained, [*frozen, *module.named_buffers()]


def _entries(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Entry, ...]:
    entries, start = [], 0
    for name, tensor in tensors:
        entry = Entry(name=name, shape=tuple(tensor.shape), start=start, integer=not tensor.is_floating_point())
        entries.append(entry)
        start += entry.size
    return tuple(entries)


class FlatNetwork:
    """A network whose parameters are views of one contiguous vector.

    Loading new weights is one copy and reading them back is another, whatever the number of layers, so a worker keeps
    one network and swaps the weights of hospital after hospital in place.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Move `module` to `device` and lay its parameters out flat; the module is changed in place."""
        self.module = module.to(device)
        self.device = device
        self.layout = layout_of(module)
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32:
                raise ModelError(f"parameter {name} is {parameter.dtype}; a network travels as float32")
        self._parameters = torch.empty(self.layout.num_parameters, device=device)
        trained, constant = _parted(module)
        with torch.no_grad():
            for entry, (_, tensor) in zip(self.layout.parameters, trained, strict=True):
                view = self._parameters[entry.span].view(entry.shape)
                tensor.data = view.copy_(tensor)
        self._buffers = [tensor for _, tensor in constant]
        self.parameters = [tensor for _, tensor in trained]  # in the layout's order

    def __call__(self, images: Tensor, *, channels_last: bool = False) -> Tensor:
        """Logits of images; a tuple of them, finest first, from a network in training that gives coarser ones too."""
        if channels_last:
            images = channels_innermost(images)
        logits: Tensor = self.module(images)
        return logits

    @property
    def margin_voxels(self) -> int:
        """What an image must bring on every side besides what is to be predicted; 0 for most networks."""
        return margin_of(self.module)

    @property
    def vector(self) -> Tensor:
        """All parameters as one vector on the network's device: the parameters themselves, not a copy."""
        return self._parameters

    def cut(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector of all parameters, (num_parameters,), in the shapes of `parameters`."""
        return [vector[entry.span].view(entry.shape) for entry in self.layout.parameters]

    def on_device(self, vector: FloatVector) -> Tensor:
        """A copy of a vector of all parameters where the network computes."""
        return torch.from_numpy(np.array(vector, np.float32)).to(self.device)

    def state(self) -> dict[str, Tensor]:
        """The weights as tensors to be saved: bit for bit, where `weights` gives what travels."""
        return {"parameters": self._parameters, **{f"buffer/{n}": tensor for n, tensor in enumerate(self._buffers)}}

    @torch.no_grad()
    def restore_(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._parameters.copy_(state["parameters"])
        for number, tensor in enumerate(self._buffers):
            tensor.copy_(state[f"buffer/{number}"])

    @torch.no_grad()
    def load_(self, weights: Weights) -> None:
        """Swap in `weights`.

        Raises:
            ModelError: a vector has another length than the layout says.
        """
        expected = (self.layout.num_parameters, self.layout.num_buffers)
        got = (weights.parameters.size, weights.buffers.size)
        if expected != got:
            raise ModelError(f"weights of {got} (parameters, buffers) values do not fit a network of {expected}")
        if self.device.type == "cpu":
            np.copyto(self._parameters.numpy(), weights.parameters)
        else:
            self._parameters.copy_(torch.from_numpy(weights.parameters.copy()))
        for entry, tensor in zip(self.layout.buffers, self._buffers, strict=True):
            tensor.copy_(torch.from_numpy(weights.buffers[entry.span].copy()).view(entry.shape))

    def weights(self) -> Weights:
        """A copy of the present weights as two float32 vectors on the CPU."""
        flat = [tensor.detach().to("cpu", torch.float32).reshape(-1) for tensor in self._buffers]
        buffers = torch.cat(flat) if flat else torch.empty(0)
        parameters = self._parameters.detach().to("cpu", copy=True).numpy()
        return Weights(parameters=parameters, buffers=buffers.numpy())


def mixes_images(module: nn.Module) -> bool:
    """Whether a network in training has BatchNorm that is not frozen: it normalises images by the others of a batch."""
    return any(isinstance(layer, _BatchNorm) and layer.training for layer in module.modules())


def network_of(config: RunConfig) -> nn.Module:
    """The network of a run, as it is before its first round."""
    return build(config.model, **_circumstances(config))


def weights_report(config: RunConfig, images: Tensor | None) -> str:
    """What became of `model.weights`, and on images (N, C, …) how far the outputs moved without BatchNorm."""
    return str(build_with_report(config.model, **_circumstances(config), images=images))


def resident_network(config: RunConfig, device: str) -> FlatNetwork:
    """The network that this process keeps between tasks."""
    return _resident(config.model, device, **_circumstances(config))


@lru_cache(maxsize=1)
def _resident(model: ModelConfig, device: str, **circumstances: Any) -> FlatNetwork:
    return FlatNetwork(build(model, **circumstances), torch.device(device))


def _circumstances(config: RunConfig) -> dict[str, Any]:
    """What besides its own section makes a run's network."""
    return {
        "outputs": len(config.task.labels),
        "seed": config.seed,
        "dimensions": config.dimensions,
        "context": config.data.items == "patches",
    }


def channels_innermost(images: Tensor) -> Tensor:
    """A copy of images (N, C, …) whose channels are innermost in memory.

    Convolutions choose their order of memory by the strides. `Tensor.contiguous` leaves those of images of one channel
    as they are, since their order of memory is either.
    """
    return images.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
