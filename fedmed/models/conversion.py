"""From BatchNorm to GroupNorm: how a pretrained network becomes one that can train under differential privacy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def moved(before: nn.Module, after: nn.Module, images: Tensor) -> float:
    """Returns ‖after(x) − before(x)‖ / ‖before(x)‖ over all images, in evaluation mode; modes are put back.

    It depends on the images, so they should be like those to come.
    """
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

    No conversion is exact: a BatchNorm divides by constants, a GroupNorm by statistics of the image at hand. This one
    is for an image that is like the average of those that the running statistics saw; fine-tuning does the rest.

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
