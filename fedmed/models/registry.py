"""The one door to a network: `build`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models.chexnet import chexnet
from fedmed.models.small_cnn import small_cnn
from fedmed.models.unet import unet
from fedmed.models.weights import load_weights

Network = Callable[..., nn.Module]  # called with the keywords in_channels, outputs, norm, width

MODELS: dict[str, Network] = {
    "chexnet": chexnet,
    "unet": unet,
    "small-cnn": small_cnn,
}


def build(model: ModelConfig, *, outputs: int, seed: int) -> nn.Module:
    """Returns the network that `model` describes, on the CPU, in training mode.

    The same (model, outputs, seed) makes the same weights bit for bit, whatever the state of torch's generators, which
    are left as they were. A network of the user's own draws from torch's global CPU generator to be as reproducible.

    Args:
        model: The `[model]` section of a run. `name` is a key of `MODELS` or `"module:function"`.
        outputs: Number of labels, at least 1.
        seed: Seed of the initial weights, an integer of 64 bits.

    Raises:
        ModelError: If no such network is known or can be made, or if `model.weights` does not fit it.
    """
    if outputs < 1:
        raise ModelError(f"a network needs at least one output, got {outputs}; name the labels in task.labels")
    function = _import(model.name) if ":" in model.name else _known(model.name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the caller's GPUs too
        network = _call(function, model, outputs)
    if model.weights:
        load_weights(network, model.weights)
    return network


def _known(name: str) -> Network:
    if name in MODELS:
        return MODELS[name]
    nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
    raise ModelError(
        f"model.name is {name!r}, which no network has; did you mean {nearest!r}? "
        f'Known: {", ".join(MODELS)}, or your own as "module:function"'
    )


def _import(path: str) -> Network:
    """Returns the function that a dotted path such as `hospital.networks:resnet` names."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name or ":" in function_name:
        raise ModelError(f'model.name is {path!r}; expected "module:function"')
    try:
        module = import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ModelError(
            f"model.name is {path!r}, but {module_name!r} cannot be imported ({_line(error)}); "
            "is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "nothing of that name" if function is None else f"a {type(function).__name__}"
        raise ModelError(f"model.name is {path!r}; expected a function in {module_name!r}, found {found}")
    network: Network = function
    return network


def _call(function: Network, model: ModelConfig, outputs: int) -> nn.Module:
    try:
        network = function(in_channels=model.in_channels, outputs=outputs, norm=model.norm, width=model.width)
    except ModelError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise ModelError(
            f"model.name is {model.name!r}, which failed when called with in_channels={model.in_channels}, "
            f"outputs={outputs}, norm={model.norm!r}, width={model.width}: {_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"model.name is {model.name!r}; it returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def _line(error: Exception) -> str:
    """Returns an exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
