"""The one door to a network: `build`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models.attention_unet import attention_unet
from fedmed.models.chexnet import chexnet
from fedmed.models.cnn_lstm import cnn_lstm
from fedmed.models.conversion import moved
from fedmed.models.deepmedic import deepmedic
from fedmed.models.foreign import call_as_monai, follows_monai, without_in_place_
from fedmed.models.fusion import late_fusion, require_separate
from fedmed.models.low_rank import adapt_
from fedmed.models.resnet50 import resnet50
from fedmed.models.small_cnn import small_cnn
from fedmed.models.spatial import margin_of
from fedmed.models.stages import freeze_
from fedmed.models.unet import unet
from fedmed.models.vgg16 import vgg16
from fedmed.models.weights import Loaded, load_weights

# Called with the keywords in_channels, outputs, norm and width; and, if it has such parameters, with `dimensions`,
# `context` and any other key of the [model] section, such as `residual`.
Network = Callable[..., nn.Module]

MODELS: dict[str, Network] = {
    "chexnet": chexnet,
    "resnet50": resnet50,
    "vgg16": vgg16,
    "unet": unet,
    "attention-unet": attention_unet,
    "deepmedic": deepmedic,
    "small-cnn": small_cnn,
    "cnn-lstm": cnn_lstm,
}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A network, and what became of the weights that it was to start from."""

    network: nn.Module
    loaded: Loaded | None  # None without model.weights
    moved: float | None  # how far the outputs moved where BatchNorm layers became others; see `conversion.moved`

    def __str__(self) -> str:
        """One line for a person; empty without model.weights."""
        far = "" if self.moved is None else f"; without BatchNorm the outputs moved by {self.moved:.0%} of their norm"
        return "" if self.loaded is None else f"{self.loaded}{far}"


def build(model: ModelConfig, *, outputs: int, seed: int, dimensions: int = 2, context: bool = False) -> nn.Module:
    """Returns the network that `model` describes, on the CPU, in training mode.

    The same (model, outputs, seed, dimensions) makes the same weights bit for bit, whatever the state of torch's
    generators, which are left as they were. A network of the user's own draws from torch's global CPU generator to be
    as reproducible.

    Args:
        model: The `[model]` section of a run. `name` is a key of `MODELS` or `"module:function"`.
        outputs: Number of labels, at least 1.
        seed: Seed of the initial weights, an integer of 64 bits.
        dimensions: 2 for images (N, C, H, W), 3 for volumes, patches or series (N, C, D, H, W).
        context: Whether images are boxes of volumes, with what the network asks for around them (`margin_of`).

    Raises:
        ModelError: If no such network is known or can be made, or if `model.weights` or `model.freeze` does not fit it.
    """
    settings = {**model.model_dump(), "context": context}
    network, _ = _build(settings, outputs=outputs, seed=seed, dimensions=dimensions)
    require_separate(network)
    return network


def build_with_report(
    model: ModelConfig,
    *,
    outputs: int,
    seed: int,
    dimensions: int = 2,
    context: bool = False,
    images: Tensor | None = None,
) -> Built:
    """Returns what `build` does, and what the weights file gave.

    Args:
        model: As for `build`; so are `outputs`, `seed` and `dimensions`.
        outputs: Number of labels.
        seed: Seed of the initial weights.
        dimensions: 2 or 3.
        context: As for `build`.
        images: (N, C, [D,] H, W), on which to measure how far the outputs moved, best those to train on; without,
            evenly distributed noise of 64 pixels a side (24 in 3D).

    Raises:
        ModelError: As `build`.
    """
    settings = {**model.model_dump(), "context": context}
    network, loaded = _build(settings, outputs=outputs, seed=seed, dimensions=dimensions)
    require_separate(network)
    if loaded is None or not loaded.folded:
        return Built(network=network, loaded=loaded, moved=None)
    if images is None:
        sides = [64, 64] if dimensions == 2 else [24 + 2 * margin_of(network)] * 3
        images = torch.rand(4, model.in_channels, *sides, generator=torch.Generator().manual_seed(seed))
    original, _ = _build({**settings, "norm": "batch"}, outputs=outputs, seed=seed, dimensions=dimensions)
    return Built(network=network, loaded=loaded, moved=moved(original, network, images))


def _build(settings: dict[str, Any], *, outputs: int, seed: int, dimensions: int) -> tuple[nn.Module, Loaded | None]:
    name, in_channels = settings["name"], settings["in_channels"]
    if outputs < 1:
        raise ModelError(f"a network needs at least one output, got {outputs}; name the labels in task.labels")
    function = _import(name) if ":" in name else _known(name, dimensions)

    def make(channels: int) -> nn.Module:
        return _call(function, {**settings, "in_channels": channels, "outputs": outputs, "dimensions": dimensions})

    network: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the caller's GPUs too
        if settings.get("fusion") == "late":
            modalities = settings.get("modalities", 0)
            network = late_fusion(make, in_channels=in_channels, modalities=modalities, outputs=outputs)
        else:
            network = make(in_channels)
    loaded = load_weights(network, settings["weights"]) if settings["weights"] else None
    if settings.get("freeze"):
        freeze_(network, settings["freeze"])
    if settings.get("low_rank"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            adapt_(network, settings["low_rank"])
    return network, loaded


def _known(name: str, dimensions: int) -> Network:
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise ModelError(
            f"model.name is {name!r}, which no network has; did you mean {nearest!r}? "
            f'Known: {", ".join(MODELS)}, or your own as "module:function"'
        )
    if dimensions == 3 and "dimensions" not in inspect.signature(MODELS[name]).parameters:
        able = [known for known, function in MODELS.items() if "dimensions" in inspect.signature(function).parameters]
        raise ModelError(f"{name} is a network for images, and data.items asks for volumes; 3D: {', '.join(able)}")
    return MODELS[name]


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


def _call(function: Network, settings: dict[str, Any]) -> nn.Module:
    """Returns what one of our functions, or a user's, makes of the settings that it has parameters for."""
    keywords = {name: settings[name] for name in ("in_channels", "outputs", "norm", "width")}
    name = settings["name"]
    try:
        if follows_monai(function):
            network = call_as_monai(function, settings)
        else:
            extra = inspect.signature(function).parameters.keys() & settings.keys() - keywords.keys()
            network = function(**keywords, **{key: settings[key] for key in extra - {"name", "weights"}})
    except ModelError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise ModelError(
            f"model.name is {name!r}, which failed when called with in_channels={settings['in_channels']}, "
            f"outputs={settings['outputs']}, norm={settings['norm']!r}, width={settings['width']}: {_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"model.name is {name!r}; it returned a {type(network).__name__}, not a torch.nn.Module")
    without_in_place_(network)
    return network


def _line(error: Exception) -> str:
    """Returns an exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
