"""Corrections of the gradient between the backward pass and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmed.training.network import FlatNetwork
from fedmed.types import FloatVector

Correction = Callable[[], None]  # changes the gradients of a network in place


@torch.no_grad()
def add_to_gradients_(parameters: Sequence[Tensor], terms: Sequence[Tensor], factor: float = 1.0) -> None:
    """∇ ← ∇ + factor · term, for every parameter that the loss reached; one call for all of them.

    A parameter without a gradient took no part in the loss. The optimizer leaves it alone, and so does this.
    """
    pairs = [(parameter.grad, term) for parameter, term in zip(parameters, terms, strict=True)]
    reached = [(gradient, term) for gradient, term in pairs if gradient is not None]
    if reached:
        gradients, added = map(list, zip(*reached, strict=True))
        torch._foreach_add_(gradients, added, alpha=factor)


def proximal(network: FlatNetwork, anchor: FloatVector, strength: float) -> Correction:
    """The gradient of μ/2 · ‖w − anchor‖², which is μ · (w − anchor)  (Li et al. 2018, arXiv:1812.06127, eq. 2).

    The difference is taken before it is scaled: it is small, and exactly zero where the network has not moved.

    Args:
        network: whose gradients are corrected.
        anchor: (num_parameters,) from where the network is not to stray.
        strength: μ, at least 0.
    """
    centre = network.on_device(anchor)
    distance = torch.empty_like(centre)
    terms = network.cut(distance)

    @torch.no_grad()
    def correct_() -> None:
        torch.sub(network.vector, centre, out=distance)
        add_to_gradients_(network.parameters, terms, strength)

    return correct_


def constant(network: FlatNetwork, vector: FloatVector) -> Correction:
    """The same vector is added to the gradient in every step.

    Args:
        network: whose gradients are corrected.
        vector: (num_parameters,).
    """
    terms = network.cut(network.on_device(vector))
    return lambda: add_to_gradients_(network.parameters, terms)
