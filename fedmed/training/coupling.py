"""Whether a network keeps the images of a batch apart: else no image has a gradient of its own to be clipped."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from fedmed.errors import ModelError
from fedmed.imaging.dataset import Dataset
from fedmed.training.clipping import GradientClipper
from fedmed.training.loop import seeded
from fedmed.training.network import FlatNetwork, mixes_images

NEAR = 1e-4  # of the largest output: a library may round otherwise for other neighbours
SEED = 20  # the same weights and the same dropout each time


def require_fixed_statistics(module: nn.Module) -> None:
    """Refuse BatchNorm that is not frozen, before anything is charged.

    Raises:
        ModelError: there is such a layer.
    """
    if mixes_images(module.train()):
        text = (
            'BatchNorm mixes the images of a batch, so it cannot be trained under privacy; set model.norm = "group", '
            "or freeze all of it, by model.freeze or model.low-rank, with the statistics of model.weights"
        )
        raise ModelError.told(text)


@torch.no_grad()
def require_uncoupled(network: FlatNetwork, data: Dataset) -> None:
    """Try the network, as in training, on noise: a picture beside two different neighbours; two pictures, and three.

    Layers that couple are refused by their kind when they are clipped; this finds what a network's own code does. It is
    done with random weights, for those that a server sent could drown what the neighbours change.

    Args:
        network: a copy of it is tried, on its device.
        data: the site's; only the size of its images is used.

    Raises:
        ModelError: what the network says of the picture depends on its neighbour, or a layer's rows are not the images.
    """
    channels, *sides = data.shape
    shape = (max(channels, data.channels), *(side + 2 * network.margin_voxels for side in sides))
    module = deepcopy(network.module).train()
    with seeded(SEED, torch.device("cpu")):
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
        pictures = torch.rand(3, *shape)
    beside = [_outputs(module, pictures[[0, other]].to(network.device)) for other in (1, 2)]
    for first, second in zip(*beside, strict=True):
        if not torch.allclose(first[0], second[0], rtol=0, atol=NEAR * float(first[0].abs().max())):
            raise ModelError(
                "what the network says of an image depends on the other images of the batch, so no patient's gradient "
                "can be clipped",
                public="the network couples the images of a batch and cannot be trained under dp-sgd",
            )
    with seeded(SEED, network.device):
        GradientClipper(module, max_norm=1.0).refuse_folding(pictures.to(network.device))


def _outputs(module: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    with seeded(SEED, images.device):
        found = module(images)
    return (found,) if isinstance(found, Tensor) else tuple(found)
