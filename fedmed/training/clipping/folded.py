"""Layers with few parameters, folded: every image has a copy of the parameters, and the batch becomes channels.

(n, C, …) with C scales is the same as (1, n · C, …) with n · C scales where a layer treats channels or groups of them
alone. Autograd then leaves the gradients of every image at its copy, in the same single pass as without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedmed.training.clipping.recording import Recording


def group_norm(name: str, module: nn.GroupNorm, recording: Recording, maps: Tensor) -> Tensor:
    """GroupNorm of maps (n, C, …)."""
    scale, shift = _affine(name, module, recording, maps)
    folded, groups = _folded(maps), module.num_groups * len(maps)
    return torch.group_norm(folded, groups, scale, shift, module.eps).view(maps.shape)


def instance_norm(name: str, module: _InstanceNorm, recording: Recording, maps: Tensor) -> Tensor:
    """InstanceNorm of maps (n, C, …) by the statistics of each."""
    scale, shift = _affine(name, module, recording, maps)
    return F.instance_norm(_folded(maps), None, None, scale, shift, True, 0.0, module.eps).view(maps.shape)


def fixed_batch_norm(name: str, module: _BatchNorm, recording: Recording, maps: Tensor) -> Tensor:
    """BatchNorm of maps (n, C, …) by its running statistics, which are constants here."""
    scale, shift = _affine(name, module, recording, maps)
    mean, variance = (None if s is None else s.repeat(len(maps)) for s in (module.running_mean, module.running_var))
    return F.batch_norm(_folded(maps), mean, variance, scale, shift, False, 0.0, module.eps).view(maps.shape)


def layer_norm(name: str, module: nn.LayerNorm, recording: Recording, rows: Tensor) -> Tensor:
    """LayerNorm of rows (n, …, *shape); its parameters spread over the axes between."""
    scale, shift = _affine(name, module, recording, rows)
    shape = (len(rows), *[1] * (rows.dim() - 1 - len(module.normalized_shape)), *module.normalized_shape)
    normal = F.layer_norm(rows, list(module.normalized_shape), None, None, module.eps)
    normal = normal if scale is None else normal * scale.view(shape)
    return normal if shift is None else normal + shift.view(shape)


def prelu(name: str, module: nn.PReLU, recording: Recording, maps: Tensor) -> Tensor:
    """PReLU of maps (n, C, …), with one slope or one for each channel."""
    recording.use(name, maps, module.weight)
    folded = maps.reshape(1, len(maps), -1) if module.num_parameters == 1 else _folded(maps)
    return F.prelu(folded, recording.own(module.weight)).view(maps.shape)


def _affine(name: str, module: nn.Module, recording: Recording, maps: Tensor) -> tuple[Tensor | None, Tensor | None]:
    scale, shift = module._parameters.get("weight"), module._parameters.get("bias")
    recording.use(name, maps, scale, shift)
    own = (None if each is None else recording.own(each) for each in (scale, shift))
    return next(own), next(own)


def _folded(maps: Tensor) -> Tensor:
    return maps.reshape(1, maps.shape[0] * maps.shape[1], *maps.shape[2:])
