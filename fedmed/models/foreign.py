"""Networks from elsewhere: MONAI's classes by their own keywords, and modules that would work in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fedmed.errors import ModelError
from fedmed.models.norms import norm_layer

OUTPUTS = ("out_channels", "num_classes")  # what MONAI's networks call the number of labels


def follows_monai(function: Callable[..., nn.Module]) -> bool:
    """Whether a function's parameters are those of MONAI's networks: spatial_dims, in_channels and out_channels."""
    parameters = inspect.signature(function).parameters
    return "outputs" not in parameters and "spatial_dims" in parameters and any(name in parameters for name in OUTPUTS)


def call_as_monai(function: Callable[..., nn.Module], settings: Mapping[str, Any]) -> nn.Module:
    """Returns the network that a class of MONAI, or one with its keywords, makes.

    Its other parameters keep their defaults; where some have none, or the defaults do not serve, a function of three
    lines in a module of one's own calls the class as it should be. Its BatchNorm layers, which DP-SGD cannot train,
    become what `norm` says; other normalizations stay as the class has them.

    Args:
        function: The class.
        settings: With in_channels, outputs, norm, width and dimensions.

    Raises:
        ModelError: If `width` is set, which such a class does not know.
    """
    if settings["width"]:
        raise ModelError("model.width means nothing to a class with MONAI's parameters; leave it 0, or wrap the class")
    parameters = inspect.signature(function).parameters
    labels = next(name for name in OUTPUTS if name in parameters)
    sizes = {"spatial_dims": settings["dimensions"], labels: settings["outputs"]}
    network = function(in_channels=settings["in_channels"], **sizes)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            layer = norm_layer(settings["norm"], module.num_features, 2 if isinstance(module, nn.BatchNorm2d) else 3)
            network.set_submodule(name, layer)
    return network


def without_in_place_(network: nn.Module) -> None:
    """Makes every activation and dropout of a network return a new tensor: hooks for per-sample gradients need the old.

    What a network's own code does in place, such as `out += identity`, no walk over modules can find.
    """
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # torch lets a module have any attribute
