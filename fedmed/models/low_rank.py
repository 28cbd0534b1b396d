"""Low-rank adaptation: a frozen trunk from given weights, of which every site trains small corrections and the head.

W x becomes W x + B A x, with W frozen and B A of rank r  (Hu et al. 2021, arXiv:2106.09685, section 4.1). Of a
convolution, A is one of the same kernel with r outputs and B a 1 × 1 convolution, so that B A corrects W in the
same shape. Both are ordinary layers, so whatever clips the gradients of such layers clips these exactly.

The server's mean is one of A and one of B, which is not the mean of the products B A; it is what fits everything else
here, and what federated low-rank adaptation mostly does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed.config import ModelConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.models.stages import freeze_, stages

FROZEN, DOWN, UP = "low_rank_frozen", "low_rank_down", "low_rank_up"
Adaptable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class LowRank(nn.Module):
    """A frozen layer and its correction, which begins as zero."""

    def __init__(self, layer: Adaptable, rank: int) -> None:
        """A has the layer's inputs and `rank` outputs; B has as many inputs, and the layer's outputs."""
        super().__init__()
        down, up = _factors(layer, rank)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        for name, module in ((FROZEN, layer), (DOWN, down), (UP, up)):
            self.add_module(name, module)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer returns with W + B A in the place of W."""
        frozen, down, up = (self.get_submodule(name) for name in (FROZEN, DOWN, UP))
        outputs: Tensor = frozen(inputs) + up(down(inputs))
        return outputs


def require_trunk(model: ModelConfig) -> None:
    """Refuse to freeze a trunk that nobody trained. Only the server knows: sites are sent its weights.

    Raises:
        ConfigError: `model.low-rank` without `model.weights`, or with `model.freeze`; or that without `model.weights`,
            unless the network is the user's own, which may bring weights along.
    """
    if model.low_rank and not model.weights:
        raise ConfigError("model.low-rank freezes the trunk as it is given, so it needs a file in model.weights")
    if model.low_rank and model.freeze:
        raise ConfigError("model.low-rank freezes the whole trunk already; leave model.freeze empty")
    if model.freeze and not model.weights and ":" not in model.name:
        raise ConfigError("model.freeze keeps stages as they are given, so it needs a file in model.weights")


def adapt_(network: nn.Module, rank: int) -> None:
    """Freeze all stages but the head, and give their linear layers and ungrouped convolutions a correction, in place.

    Raises:
        ModelError: the network has one stage only, or nothing that can be corrected.
    """
    known = stages(network)
    if len(known) < 2:
        raise ModelError("model.low-rank needs a network with a trunk and a head")
    freeze_(network, known[-2].name)
    begin = tuple(prefix for stage in known[:-1] for prefix in stage.prefixes)
    found = [
        (name, module)
        for name, module in network.named_modules()
        if f"{name}.".startswith(begin) and type(module) in get_args(Adaptable) and getattr(module, "groups", 1) == 1
    ]
    if not found:
        raise ModelError("model.low-rank finds no linear layer and no convolution in this network's trunk")
    for name, module in found:
        network.set_submodule(name, LowRank(module, rank))


def merged(tensors: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """A network's tensors by name with every correction added to its layer: those of the plain network.

    Args:
        tensors: of a network that `adapt_` changed, or of any other, which stays as it is.
    """
    plain: dict[str, NDArray[np.generic]] = {}
    for name, tensor in tensors.items():
        layer, found, of = name.rpartition(f"{FROZEN}.")
        if f"{DOWN}." in name or f"{UP}." in name:
            continue
        if found and of == "weight":
            down, up = (np.asarray(tensors[f"{layer}{part}.weight"], np.float64) for part in (DOWN, UP))
            product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            tensor = (tensor.astype(np.float64) + product.reshape(tensor.shape)).astype(tensor.dtype)
        plain[f"{layer}{of}" if found else name] = tensor
    return plain


def _factors(layer: Adaptable, rank: int) -> tuple[Adaptable, Adaptable]:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    shape: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    kind = type(layer)
    down = kind(layer.in_channels, rank, **shape, padding_mode=layer.padding_mode, bias=False)
    return down, kind(rank, layer.out_channels, 1, bias=False)
