"""Heat maps: where in an image a classifier found what speaks for a label.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), for images and volumes. A is a feature map that the last
convolution makes, y the label's logit:

    α_k = 1/Z Σ_ij ∂y/∂A_ij^k        (eq. 1)
    L = ReLU(Σ_k α_k A^k)            (eq. 2)

For a network that ends in a mean over A and a linear layer, L is the class activation map up to a factor (section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError
from fedmed.models.chexnet import CheXNet
from fedmed.models.cnn_lstm import CNNLSTM
from fedmed.models.fusion import LateFusion
from fedmed.models.resnet50 import ResNet50
from fedmed.models.small_cnn import SmallCNN
from fedmed.models.vgg16 import VGG16

LINEAR = {4: "bilinear", 5: "trilinear"}
RECTIFIED_LATER = (CheXNet,)  # a ReLU that is no module follows the layer
Modules = tuple[nn.Module, ...]

# The last layer that still knows where things are, its ReLU included.
LAYERS: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    CheXNet: lambda network: network.get_submodule("features"),
    ResNet50: lambda network: network.get_submodule("layer4"),
    VGG16: lambda network: [layer for layer in network.get_submodule("features").modules() if is_relu(layer)][-1],
    SmallCNN: lambda network: network.get_submodule("block4"),
    CNNLSTM: lambda network: network.get_submodule("block4"),
}


def grad_cam(network: nn.Module, images: Tensor, labels: Sequence[int]) -> Tensor:
    """Returns L of every image and label, interpolated to the size of the images and not normalised.

    The feature map is that of `LAYERS`; in late fusion those of all encoders together; in a network of the user's own
    that of the last convolution that is run and has more than one pixel. The network's weights and mode are kept; it
    should be in evaluation mode, and its outputs must not depend on the other images of the batch.

    Args:
        network: A classifier, (N, C, [D,] H, W) to (N, outputs).
        images: (N, C, [D,] H, W).
        labels: Indices of outputs.

    Returns:
        (N, len(labels), [D,] H, W), at least 0; all 0 where nothing speaks for the label.

    Raises:
        ModelError: If no convolution's output has the images' axes, or the logits do not depend on it.
    """
    layers = _layers(network, images)
    with torch.enable_grad(), _watched(layers, rectify=isinstance(_one(network), RECTIFIED_LATER)) as seen:
        logits = network(images)
        features = [seen[layer] for layer in layers]
        maps = [_map(logits[:, label].sum(), features) for label in labels]
    sides = tuple(images.shape[2:])
    return F.interpolate(torch.stack(maps, dim=1), size=sides, mode=LINEAR[images.ndim])


def relative(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns heat, at least 0 and of any shape, as shares of its highest value; without any it stays 0."""
    highest = heat.max(initial=0)
    shares: NDArray[np.float32] = np.clip(heat / highest, 0, 1) if highest > 0 else heat
    return shares


def is_relu(module: nn.Module) -> bool:
    """Whether the module is a rectifier."""
    return isinstance(module, nn.ReLU)


def _map(score: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Returns L (N, [d,] h, w) for the sum of all images' scores; features (N, K, [d,] h, w) count as one map."""
    gradients = torch.autograd.grad(score, features, retain_graph=True, allow_unused=True)
    total = torch.zeros(())
    for feature, gradient in zip(features, gradients, strict=True):
        if gradient is None:
            raise ModelError("no heat map: the network's output does not depend on its last convolution")
        weights = gradient.flatten(2).mean(dim=2)  # (N, K)
        total = total.to(feature.device) + torch.einsum("nk,nk...->n...", weights, feature.detach())
    return F.relu(total)


@contextmanager
def _watched(layers: Modules, *, rectify: bool) -> Iterator[dict[nn.Module, Tensor]]:
    """Gives the layers' outputs, by layer, once the network has run; gradients reach back to them and no further."""
    seen: dict[nn.Module, Tensor] = {}

    def cut(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if rectify:  # zeros as the smallest positive number: the ReLU that follows then has the gradient 1 everywhere
            output = output.clamp(min=torch.finfo(output.dtype).tiny)
        seen[layer] = output.detach().requires_grad_()
        return seen[layer].clone()  # what follows may work in place

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(cut).remove)
        yield seen


def _layers(network: nn.Module, images: Tensor) -> Modules:
    """Returns the layers whose outputs are A."""
    parts = tuple(network.encoders) if isinstance(network, LateFusion) else (network,)
    chosen = [find(part) for part in parts for kind, find in LAYERS.items() if isinstance(part, kind)]
    return tuple(chosen) if len(chosen) == len(parts) else (_last_convolution(network, images),)


def _one(network: nn.Module) -> nn.Module:
    """Returns the network, or an encoder where there are several alike."""
    return network.encoders[0] if isinstance(network, LateFusion) else network


def _last_convolution(network: nn.Module, images: Tensor) -> nn.Module:
    """Returns the convolution that is run last with an output (N, K, [d,] h, w) of more than one pixel."""
    ran: list[nn.Module] = []

    def note(layer: nn.Module, inputs: object, output: Tensor) -> None:
        if output.ndim == images.ndim and len(output) == len(images) and output[0, 0].numel() > 1:
            ran.append(layer)

    with ExitStack() as stack, torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                stack.callback(layer.register_forward_hook(note).remove)
        network(images)
    if not ran:
        raise ModelError("no heat map: the network has no convolution whose output still has the image's axes")
    return ran[-1]
