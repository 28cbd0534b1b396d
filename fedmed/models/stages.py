"""The stages of a network from image to head: what fine-tuning freezes, and how fast it trains the rest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from fedmed.errors import ModelError


@runtime_checkable
class Staged(Protocol):
    """A network that names its stages, each with the beginnings of its parameters' names, the head last."""

    stage_prefixes: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some parameters of a network that are frozen, or trained, together."""

    name: str
    prefixes: tuple[str, ...]  # of the names of its parameters and buffers
    parameters: tuple[str, ...]


def stages(network: nn.Module) -> tuple[Stage, ...]:
    """Returns the stages of a network in order, the head last; every parameter is in one of them.

    A network that names no stages has one for each of its children that has parameters.

    Raises:
        ModelError: If a parameter is in no stage or in several.
    """
    prefixes: Mapping[str, tuple[str, ...]]
    if isinstance(network, Staged):
        prefixes = network.stage_prefixes
    else:
        own = [name for name, _ in network.named_parameters(recurse=False)]
        prefixes = _children(network) | {name: (name,) for name in own}
    names = [name for name, _ in network.named_parameters()]
    found = tuple(
        Stage(name=stage, prefixes=begin, parameters=tuple(name for name in names if name.startswith(begin)))
        for stage, begin in prefixes.items()
    )
    if sorted(name for stage in found for name in stage.parameters) != sorted(names):
        raise ModelError("the network's stages do not hold every parameter exactly once")
    return found


def before_head(network: nn.Module, *head: str) -> Mapping[str, tuple[str, ...]]:
    """Returns the prefixes of a stage for each child that has parameters, and of a head made of the named children."""
    trunk = {name: prefixes for name, prefixes in _children(network).items() if name not in head}
    return {**trunk, "head": tuple(f"{name}." for name in head)}


def _children(network: nn.Module) -> dict[str, tuple[str, ...]]:
    children = [name for name, child in network.named_children() if next(child.parameters(), None) is not None]
    return {name: (f"{name}.",) for name in children}


def freeze_(network: nn.Module, up_to: str) -> tuple[str, ...]:
    """Freezes the stages from the image up to and with `up_to`, in place, and returns their parameters' names.

    Frozen parameters have requires_grad False and never change. BatchNorm layers of images and volumes among them are
    replaced by ones that stay in evaluation mode, so that their running statistics never change either; a BatchNorm1d
    of a user's own network is left as it is.

    Raises:
        ModelError: If no stage has that name, or none would be left to train.
    """
    known = stages(network)
    names = [stage.name for stage in known]
    if up_to not in names[:-1]:
        nearest = difflib.get_close_matches(up_to, names[:-1], n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ModelError(f"model.freeze is {up_to!r}; this network can be frozen up to {', '.join(names[:-1])}{hint}")
    chosen = known[: names.index(up_to) + 1]
    frozen = tuple(name for stage in chosen for name in stage.parameters)
    begin = tuple(prefix for stage in chosen for prefix in stage.prefixes)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) and f"{name}.".startswith(begin):
            network.set_submodule(name, _fixed(module))
    for name in frozen:
        network.get_parameter(name).requires_grad_(False)
    return frozen


def parameter_groups(network: nn.Module, *, learning_rate: float, decay: float = 1.0) -> list[dict[str, Any]]:
    """Returns the trainable parameters as an optimizer's groups, a stage each, with discriminative learning rates.

    η(stage) = η(next stage) · decay, η(head) = `learning_rate`   (Howard & Ruder 2018, arXiv:1801.06146, section 3.2,
    where decay = 1 / 2.6). With decay = 1 every group has the same rate.

    Args:
        network: Frozen parameters are left out, and stages that have no others.
        learning_rate: Of the head.
        decay: In (0, 1].

    Raises:
        ModelError: If `decay` is not in (0, 1], or every parameter is frozen.
    """
    if not 0 < decay <= 1:
        raise ModelError(f"the decay of learning rates per stage is {decay}; expected more than 0 and at most 1")
    groups: list[dict[str, Any]] = []
    known = stages(network)
    for depth, stage in enumerate(reversed(known)):
        parameters = [network.get_parameter(name) for name in stage.parameters]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if trained:
            groups.append({"params": trained, "lr": learning_rate * decay**depth, "name": stage.name})
    if not groups:
        raise ModelError("every parameter of the network is frozen; there is nothing to train")
    return groups[::-1]


class FixedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that stays in evaluation mode: its statistics are constants, and it sees one image at a time."""

    def train(self, mode: bool = True) -> FixedBatchNorm2d:
        """Stays in evaluation mode."""
        super().train(False)
        return self


class FixedBatchNorm3d(nn.BatchNorm3d):
    """A BatchNorm3d that stays in evaluation mode."""

    def train(self, mode: bool = True) -> FixedBatchNorm3d:
        """Stays in evaluation mode."""
        super().train(False)
        return self


def _fixed(norm: nn.BatchNorm2d | nn.BatchNorm3d) -> nn.Module:
    kind = FixedBatchNorm2d if isinstance(norm, nn.BatchNorm2d) else FixedBatchNorm3d
    fixed = kind(norm.num_features, eps=norm.eps).to(norm.weight)
    fixed.load_state_dict(norm.state_dict())
    return fixed.eval()
