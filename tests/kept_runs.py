"""Run folders with networks whose output is known, and what they say of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.federated.result import model_facts
from fedmed.federated.run_folder import RunFolder
from fedmed.imaging.isolation import DecodingProcess
from fedmed.models import build
from fedmed.training.network import FlatNetwork
from fedmed.training.predict.batch import Prediction, predict_images
from fedmed.training.predict.inputs import find_images
from fedmed.training.predict.kept import load_kept

FINDING = {"labels": ["bright", "dark"]}
LUNG = {"kind": "segmentation", "labels": ["lung"]}


def outline(*, in_channels: int, outputs: int, norm: str, width: int, dimensions: int = 2) -> nn.Module:
    """A mask of what is brighter than one half for the first label, and than 7/8 for the second."""
    convolution = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(in_channels, outputs, 1)
    with torch.no_grad():
        convolution.weight[:] = torch.tensor([20.0, 160.0])[:outputs].view(-1, *[1] * (dimensions + 1))
        convolution.bias[:] = torch.tensor([-10.0, -140.0])[:outputs]
    return convolution


def sure(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """Logits 18 and 30 of what is bright, and -18 and -30 of what is dark."""
    convolution = nn.Conv2d(in_channels, outputs, 1)
    with torch.no_grad():
        convolution.weight[:] = torch.tensor([36.0, 60.0]).view(-1, 1, 1, 1)
        convolution.bias[:] = torch.tensor([-18.0, -30.0])
    return convolution


def spot(*, in_channels: int, outputs: int, norm: str, width: int, dimensions: int = 2) -> nn.Module:
    """The mean of bright pixels speaks for the first label, and that of dark ones for the second."""
    convolution = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(in_channels, outputs, 1)
    with torch.no_grad():
        convolution.weight[:] = torch.tensor([1.0, -1.0]).view(-1, *[1] * (dimensions + 1))
        convolution.bias[:] = torch.tensor([0.0, 1.0])
    pool = nn.AdaptiveAvgPool2d(1) if dimensions == 2 else nn.AdaptiveAvgPool3d(1)
    return nn.Sequential(convolution, pool, nn.Flatten())


class Picky(nn.Module):
    """Fails on images without any structure."""

    def __init__(self, *, in_channels: int, outputs: int, norm: str, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.std() == 0:
            raise ValueError("secret")
        return self.head(images.flatten(2).mean(dim=2))


def kept_run(path: Path, model: dict, task: dict, *, modalities: int = 0, **data: object) -> Path:
    """A run folder with an untrained network; without a number of modalities one as it was before runs kept it."""
    config = run_file.validate({"model": model, "task": task, "data": data})
    network = network_of(config)
    folder = RunFolder.create(path, config)
    folder.save_model(
        network.weights(), network.layout, model_facts(config, 3, network.layout.hash, modalities=modalities)
    )
    folder.close()
    return path


def network_of(config: RunConfig) -> FlatNetwork:
    module = build(config.model, outputs=len(config.task.labels), seed=5, dimensions=config.dimensions)
    with torch.no_grad():
        for name, buffer in module.named_buffers():  # as if it had been trained
            buffer += 1 if name.endswith("num_batches_tracked") else 0.5
    return FlatNetwork(module.eval(), torch.device("cpu"))


def results_of(
    folder: Path,
    process: DecodingProcess,
    model: str | dict,
    task: dict,
    *images: Path,
    heat_maps: Sequence[str] | None = None,
    **data: object,
) -> list[Prediction]:
    """What a new network says of some images, drawn into the folder; no row may have an error."""
    folder.mkdir()
    settings = model if isinstance(model, dict) else {"name": f"kept_runs:{model}"}
    options = {} if heat_maps is None else {"heat_maps": True, "labels": heat_maps}
    kept = load_kept(kept_run(folder.with_name(f"{folder.name}-run"), settings, task, **data))
    found = find_images(images, kept.recipe.items, process).images
    done = list(predict_images(kept, found, folder, process, **options))
    assert [prediction.error for prediction in done] == [""] * len(done)
    return done


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def grey_png(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def colourfulness(overlay: np.ndarray) -> np.ndarray:
    """(H, W) 0 where the overlay shows the grey image alone."""
    return np.ptp(overlay.astype(int), axis=-1)


def affine_of(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Of a volume in canonical order: d to the head, h to the front, w to the right."""
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], range(4)] = (*spacing_mm, 1.0)
    return affine
