"""A network that fits neither its images nor its task is found before a run begins."""

import pytest
import torch
from torch import nn

from fedmed import config as run_file
from fedmed.errors import ConfigError, ModelError
from fedmed.models import MODELS
from fedmed.training.fitting import require_fit
from fedmed.training.network import network_of

SEGMENT = {"unet", "attention-unet", "deepmedic"}
VOLUMES = {"unet", "attention-unet", "deepmedic", "small-cnn", "cnn-lstm"}


def run(name: str, kind: str, model: dict | None = None, **data: object) -> run_file.RunConfig:
    settings = {"name": name, "width": 4, **(model or {})}
    return run_file.validate({"model": settings, "task": {"kind": kind, "labels": ["a", "b"]}, "data": data})


def fixed(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """For images of 8 x 8 pixels only."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, outputs))


def several(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    class Several(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images, images

    return Several()


@pytest.mark.parametrize("items", ["images", "slices", "volumes", "patches"])
@pytest.mark.parametrize("name", MODELS)
def test_built_in_networks_fit_their_task_and_no_other(name, items):
    data = {"items": items, "image-size": 256, "volume-size": [24, 20, 28]}
    if name not in (VOLUMES if items in ("volumes", "patches") else set(MODELS) - {"cnn-lstm"}):
        with pytest.raises(ModelError):
            network_of(run(name, "segmentation", **data))
        return
    kinds = ["segmentation", "classification"]
    right, wrong = kinds if name in SEGMENT else kinds[::-1]
    require_fit(network_of(run(name, right, **data)), run(name, right, **data))
    with pytest.raises(ConfigError, match=rf'"{name}" does not fit task\.kind = "{wrong}".*segmentation are unet'):
        require_fit(network_of(run(name, wrong, **data)), run(name, wrong, **data))


@pytest.mark.parametrize(
    ("name", "size", "error", "words"),
    [
        ("chexnet", 16, ModelError, r"raise data\.image-size"),
        ("test_training_fitting:fixed", 8, None, ""),
        ("test_training_fitting:fixed", 100, ConfigError, r"fails on an image of 1 x 100 x 100 \(RuntimeError"),
        ("test_training_fitting:several", 8, ConfigError, "it gives tuple, expected"),
    ],
)
def test_images_are_tried_in_the_size_that_the_network_gets(name, size, error, words):
    config = run(name, "classification", **{"image-size": size})
    if error is None:
        require_fit(network_of(config), config)
        return
    with pytest.raises(error, match=words):
        require_fit(network_of(config), config)


def test_late_fusion_and_deep_supervision_fit():
    for model in (
        {"in-channels": 2, "fusion": "late", "modalities": 2, "norm": "group"},
        {"deep-supervision": True},
    ):
        config = run("unet", "segmentation", model)
        require_fit(network_of(config), config)
