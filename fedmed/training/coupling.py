"""Whether the images of a batch see each other in a network: then no image has a gradient of its own to be clipped."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmed.errors import ModelError
from fedmed.imaging.dataset import Dataset
from fedmed.training.loop import seeded
from fedmed.training.network import FlatNetwork

NEAR = 1e-3  # of the largest output: a library may round otherwise for other neighbours
SEED = 20  # the same dropout twice


@torch.no_grad()
def require_uncoupled(network: FlatNetwork, data: Dataset) -> None:
    """Try the network, as in training, on a picture of noise beside two different neighbours. Its buffers are put back.

    Layers that couple are refused by their kind when they are clipped; this finds what a network's own code does.

    Args:
        network: on its device, with the weights that it was sent.
        data: the site's; only the size of its images is used.

    Raises:
        ModelError: what the network says of the picture depends on its neighbour.
    """
    shape = data.batch(np.zeros(1, np.int64))[0].shape[1:]
    buffers = [(buffer, buffer.clone()) for buffer in network.module.buffers()]
    was = network.module.training
    network.module.train()
    with seeded(SEED, torch.device("cpu")):
        pictures = torch.rand(3, *shape)
    try:
        first, second = (_outputs(network, pictures[[0, other]])[0].nan_to_num() for other in (1, 2))
    finally:
        network.module.train(was)
        for buffer, before in buffers:
            buffer.copy_(before)
    if not torch.allclose(first, second, rtol=0, atol=NEAR * float(first.abs().max().clamp(min=1e-6))):
        raise ModelError(
            "what the network says of an image depends on the other images of the batch, so no patient's gradient can "
            "be clipped",
            public="the network couples the images of a batch and cannot be trained under dp-sgd",
        )


def _outputs(network: FlatNetwork, images: Tensor) -> Tensor:
    with seeded(SEED, network.device):
        found = network(images.to(network.device))
    return found if isinstance(found, Tensor) else found[0]
