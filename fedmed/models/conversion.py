"""From BatchNorm to GroupNorm: how a pretrained network becomes one that can train under differential privacy."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmed.models.norms import group_count


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A network without BatchNorm, and how far it moved from the one that it was made of."""

    network: nn.Module
    layers: int  # BatchNorm layers that became GroupNorm layers
    moved: float  # ‖outputs after − outputs before‖ / ‖outputs before‖, both in evaluation mode

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.layers} BatchNorm layers became GroupNorm; the outputs moved by {self.moved:.0%} of their norm"


def group_normalized(network: nn.Module, images: Tensor) -> Converted:
    """Returns a copy of `network` with GroupNorm in place of every BatchNorm, and how far its outputs moved.

    No conversion is exact: a BatchNorm divides by constants, a GroupNorm by statistics of the image at hand. `folded`
    makes them agree for an image that is like the average of those that the running statistics saw, and fine-tuning
    does the rest. How far the outputs moved depends on the images, so use ones like those to come.

    Args:
        network: Not changed. Each BatchNorm must have a scale, a shift and running statistics.
        images: (N, C, [D,] H, W), on which the two networks are compared.
    """
    converted = copy.deepcopy(network)
    layers = 0
    for name, module in list(converted.named_modules()):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is not None:
            converted.set_submodule(name, _group_norm(module))
            layers = layers + 1
    return Converted(network=converted, layers=layers, moved=moved(network, converted, images))


def moved(before: nn.Module, after: nn.Module, images: Tensor) -> float:
    """Returns ‖after(x) − before(x)‖ / ‖before(x)‖ over all images, in evaluation mode; modes are put back."""
    with torch.no_grad():
        outputs = []
        for network in (before, after):
            modes = {module: module.training for module in network.modules()}
            outputs.append(network.eval()(images))
            for module, mode in modes.items():
                module.training = mode
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


def folded(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, groups: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Returns scale and shift of the GroupNorm that does to an average image what the BatchNorm does to it.

    BatchNorm: γ (x − μ_c) / √(σ_c² + ε) + β, with running statistics μ_c, σ_c² of each channel c. GroupNorm:
    γ' (x − m) / √(s² + ε) + β', with statistics of the image's own group of channels. Where the image has the running
    statistics, m = mean of μ_c and s² = mean of (σ_c² + μ_c²) − m², and both are equal with

        γ' = γ √(s² + ε) / √(σ_c² + ε),    β' = β + γ (m − μ_c) / √(σ_c² + ε).

    With a group per channel (InstanceNorm) that is γ' = γ, β' = β; so it is where the channels of a group are alike.

    Args:
        weight: γ (C,).
        bias: β (C,).
        mean: μ (C,).
        variance: σ² (C,).
        groups: Number of groups, a divisor of C.
        eps: ε of both layers.
    """
    means = mean.reshape(groups, -1)  # (groups, channels of a group)
    of_group = means.mean(dim=1, keepdim=True)
    spread = variance.reshape(groups, -1) + (means - of_group).square()
    of_image = (spread.mean(dim=1, keepdim=True) + eps).sqrt()  # √(s² + ε) (groups, 1)
    deviation = (variance + eps).sqrt()  # (C,)
    scale = weight * (of_image.expand_as(means).reshape(-1) / deviation)
    shift = bias + weight * ((of_group - means).reshape(-1) / deviation)
    return scale, shift


def _group_norm(norm: nn.BatchNorm2d | nn.BatchNorm3d) -> nn.GroupNorm:
    groups = group_count(norm.num_features)
    converted = nn.GroupNorm(groups, norm.num_features, eps=norm.eps, dtype=norm.weight.dtype)
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            scale, shift = folded(
                norm.weight, norm.bias, norm.running_mean, norm.running_var, groups=groups, eps=norm.eps
            )
            converted.weight.copy_(scale)
            converted.bias.copy_(shift)
    return converted.to(norm.weight.device).train(norm.training)
