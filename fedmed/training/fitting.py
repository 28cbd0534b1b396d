"""Whether a run's network, images and task fit each other: tried on one image of noise, before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmed.config import RunConfig
from fedmed.errors import ConfigError, FedmedError
from fedmed.models import MODELS, margin_of

ENOUGH = {2: 64, 3: 32}  # pixels a side; what fedmed's own networks can do with so many, they can with more


def require_fit(network: nn.Module, config: RunConfig) -> None:
    """Try a run's network on an image of the run's size.

    Args:
        network: as built for the run; it is left in evaluation mode.
        config: whose images are made by fedmed, and not by a function of the user's own, which may make anything.

    Raises:
        ConfigError: the network fails on such an image, or gives something else than the task needs.
        ModelError: the image is too small for the network.
    """
    name, labels = config.model.name, len(config.task.labels)
    sides = config.data.volume_size if config.dimensions == 3 else (config.data.image_size,) * 2
    if name in MODELS:
        sides = tuple(min(side, ENOUGH[config.dimensions]) for side in sides)
    shown = [side + 2 * margin_of(network) for side in sides]
    noise = torch.rand(1, config.model.in_channels, *shown, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            found = network.eval()(noise)
    except FedmedError:
        raise
    except Exception as error:  # a user's network may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f'model.name = "{name}" fails on an image of {_times(noise.shape[1:])} ({reason})') from error
    expected = (1, labels, *sides) if config.task.kind == "segmentation" else (1, labels)
    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if got != expected:
        raise ConfigError(
            f'model.name = "{name}" does not fit task.kind = "{config.task.kind}": for one image of '
            f"{_times(noise.shape[1:])} it gives {got}, expected {expected}. Networks for segmentation are unet, "
            "attention-unet and deepmedic"
        )


def _times(sides: torch.Size) -> str:
    return " x ".join(str(side) for side in sides)
