"""FedBN: every site has its own norm layers; only the rest of the network is shared."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedmed.config import StrategyConfig
from fedmed.errors import ModelError
from fedmed.training.local_algorithms.visit import Outcome, Visit
from fedmed.training.network import FlatNetwork
from fedmed.types import Entry, FloatVector, Weights

NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
Mask = NDArray[np.bool_]


def fedbn(visit: Visit) -> Outcome:
    """Train all layers, send all but the norm layers  (Li et al. 2021, arXiv:2102.07623, algorithm 1).

    Scale, shift and running statistics of the norm layers stay at the site. In their places the update carries what
    the server sent, so that its length and layout are those of any update and the server's mean leaves them as they
    were.
    """
    trained = visit.train_()
    own, masks = visit.network.weights(), norm_masks(visit.network)
    kept = {"parameters": own.parameters[masks[0]], "buffers": own.buffers[masks[1]]}
    shared = Weights(
        parameters=np.where(masks[0], visit.received.parameters, own.parameters),
        buffers=np.where(masks[1], visit.received.buffers, own.buffers),
    )
    return Outcome(trained=trained, weights=shared, kept=kept)


def no_single_network(strategy: StrategyConfig) -> str:
    """Why a run has no network that the server could evaluate; empty where it has one."""
    if strategy.name != "fedbn":
        return ""
    return "under fedbn every site has norm layers of its own, so there is no single global network to evaluate"


def with_own_norms(network: FlatNetwork, received: Weights, kept: Mapping[str, FloatVector]) -> Weights:
    """The received weights with the site's own norm layers in them; in a site's first round they are the received ones.

    Raises:
        ModelError: the network has no norm layer, or others than those that were kept.
    """
    masks = norm_masks(network)
    if not kept:
        return received
    whole = Weights(parameters=received.parameters.copy(), buffers=received.buffers.copy())
    for vector, mask, name in ((whole.parameters, masks[0], "parameters"), (whole.buffers, masks[1], "buffers")):
        if name not in kept or kept[name].size != mask.sum():
            raise ModelError("the norm layers that this site kept are not those of the network")
        vector[mask] = kept[name]
    return whole


def norm_masks(network: FlatNetwork) -> tuple[Mask, Mask]:
    """(num_parameters,) and (num_buffers,): True where a value belongs to a norm layer, found by its type.

    Raises:
        ModelError: the network has none with anything to learn or to keep.
    """
    names, layout = require_norms(network.module), network.layout
    return _mask(layout.parameters, layout.num_parameters, names), _mask(layout.buffers, layout.num_buffers, names)


def require_norms(module: nn.Module) -> set[str]:
    """The names of all parameters and buffers of norm layers.

    Raises:
        ModelError: there is none.
    """
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, NORM_LAYERS)
        for name in (*dict(layer.named_parameters(recurse=False)), *dict(layer.named_buffers(recurse=False)))
    }
    if not names:
        text = (
            'strategy.name = "fedbn" keeps norm layers at the sites, and this network has none; '
            "choose another model.norm or another strategy"
        )
        raise ModelError.told(text)
    return names


def _mask(entries: tuple[Entry, ...], size: int, names: set[str]) -> Mask:
    mask = np.zeros(size, np.bool_)
    for entry in entries:
        mask[entry.span] = entry.name in names
    return mask
