"""Grad-CAM against what its equations give by hand, network by network."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.nn import functional as F

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import build
from fedmed.models.fusion import fused
from fedmed.training.heat_maps import grad_cam, relative


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are faster so, the more where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network_of(name: str, dimensions: int = 2, **settings: object) -> nn.Module:
    config = ModelConfig(name=name, **{"norm": "batch", **settings})
    return build(config, outputs=3, seed=1, dimensions=dimensions).eval()


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


def enlarged(maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(N, K, …) interpolated to the images' size."""
    return F.interpolate(maps, images.shape[2:], mode="bilinear" if images.ndim == 4 else "trilinear")


def by_hand(score: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2 for one image, term by term: (h, w) of features (1, K, h, w)."""
    (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
    total = torch.zeros(features.shape[2:])
    for feature, slope in zip(features[0], gradient[0], strict=True):
        total = total + slope.sum() / slope.numel() * feature.detach()
    return total.clamp(min=0)


@pytest.mark.parametrize(
    ("name", "width", "layer", "head", "shape"),
    [
        ("chexnet", 4, "features", "classifier", (2, 1, 64, 80)),
        ("resnet50", 8, "layer4", "fc", (2, 1, 64, 80)),
        ("small-cnn", 4, "block4", "classifier", (2, 1, 24, 32)),
        ("small-cnn", 4, "block4", "classifier", (2, 1, 16, 24, 24)),
    ],
)
def test_with_a_global_mean_before_the_head_it_is_the_class_activation_map(name, width, layer, head, shape):
    """Section 3.1 of the paper: α_k is the head's weight over Z, so L = ReLU(Σ w_k A_k) / Z."""
    network, images = network_of(name, dimensions=len(shape) - 2, width=width), images_of(*shape)
    with torch.no_grad():
        network.get_submodule(head).weight[0].abs_()  # so that at least one label has a map that is not 0
    seen = []
    handle = network.get_submodule(layer).register_forward_hook(lambda layer, inputs, output: seen.append(output))
    network(images)
    handle.remove()
    features = torch.relu(seen[0].detach())
    weights = network.get_submodule(head).weight.detach() / features[0, 0].numel()
    expected = torch.relu(torch.einsum("ck,nk...->nc...", weights, features))
    found = grad_cam(network, images, [0, 1, 2])
    assert found.shape == (2, 3, *shape[2:])
    torch.testing.assert_close(found, enlarged(expected, images), rtol=1e-4, atol=1e-7)
    assert found[:, 0].max() > 0


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_of_vgg_it_is_the_map_before_the_last_pooling(norm):
    network = build(ModelConfig(name="vgg16", norm=norm, width=4), outputs=3, seed=1).eval()
    images = images_of(1, 1, 64, 64)
    features = network.features[:-1](images).detach().requires_grad_()
    logits = network.classifier(torch.flatten(network.avgpool(network.features[-1](features)), 1))
    expected = torch.stack([by_hand(logits[0, label], features) for label in (2, 0)])[None]
    assert expected.shape[2:] == (4, 4)
    torch.testing.assert_close(grad_cam(network, images, [2, 0]), enlarged(expected, images), rtol=1e-4, atol=1e-9)


def test_in_late_fusion_the_encoders_maps_count_as_one():
    network = network_of("small-cnn", width=4, norm="group", in_channels=2, fusion="late", modalities=2)
    images = images_of(1, 2, 16, 16)
    maps = []
    for encoder, part in zip(network.encoders, images.split(1, dim=1), strict=True):
        pool = encoder.pool
        early = pool(encoder.block3(pool(encoder.block2(pool(encoder.block1(part))))))
        maps.append(encoder.block4(early).detach().requires_grad_())
    pooled = torch.stack([each.flatten(2).mean(dim=2) for each in maps])
    logits = network.head(fused(pooled, torch.ones(2, 1, dtype=torch.bool)))
    slopes = [torch.autograd.grad(logits[0, 1], each, retain_graph=True)[0].mean(dim=(2, 3)) for each in maps]
    total = sum((slope[:, :, None, None] * each).sum(dim=1) for slope, each in zip(slopes, maps, strict=True))
    expected = torch.relu(total.detach())[:, None]
    assert expected.max() > 0
    torch.testing.assert_close(grad_cam(network, images, [1]), enlarged(expected, images), rtol=1e-4, atol=1e-9)


def test_of_a_series_it_is_the_map_of_the_fourth_block_over_all_its_slices():
    network, images = network_of("cnn-lstm", dimensions=3, width=4), images_of(1, 1, 5, 16, 24)
    with torch.no_grad():
        pool, early = network.pool, images
        for each in (network.block1, network.block2, network.block3):
            early = pool(each(early))
    features = network.block4(early).detach().requires_grad_()
    sequence, count = features.mean(dim=(3, 4)).transpose(1, 2), torch.tensor([5])
    ends = network.forwards(sequence, count), network.backwards(sequence.flip(1), count)
    logits = network.classifier(torch.cat(ends, dim=1))
    torch.testing.assert_close(logits.detach(), network(images).detach())
    expected = torch.stack([by_hand(logits[0, label], features) for label in (2, 0, 1)])[None]
    assert expected.shape[2:] == (5, 2, 3) and (expected.flatten(2).amax(dim=2) > 0).any()
    found = grad_cam(network, images, [2, 0, 1])
    torch.testing.assert_close(found, enlarged(expected, images), rtol=1e-4, atol=1e-9)


class Own(nn.Module):
    """Bright pixels speak for label 0, dark ones for label 1; a convolution of one pixel comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(1, 2, 1)
        self.late = nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.early.weight[:] = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
            self.early.bias[:] = torch.tensor([0.0, 1.0])
            self.late.weight[:] = torch.eye(2).view(2, 2, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.early(images)
        features *= 1.0  # in place, as a user's network may
        return self.late(F.adaptive_avg_pool2d(features, 1)).flatten(1)


def test_of_an_own_network_it_is_the_last_convolution_that_still_has_pixels():
    images = torch.zeros(1, 1, 6, 6)
    images[0, 0, :2, :3] = 1
    bright, dark = grad_cam(Own(), images, [0, 1])[0]
    torch.testing.assert_close(bright, images[0, 0] / 36)
    torch.testing.assert_close(dark, (1 - images[0, 0]) / 36)


def test_a_head_that_reads_every_pixel_gives_the_mean_of_its_weights():
    """y = Σ_kij v_kij A_kij, so α_k is the mean of v_k."""
    convolution, head = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 25, 2)
    images = images_of(1, 1, 5, 5)
    alphas = head.weight.detach().view(2, 3, 25).mean(dim=2)
    expected = torch.relu(torch.einsum("ck,khw->chw", alphas, convolution(images).detach()[0]))
    torch.testing.assert_close(grad_cam(nn.Sequential(convolution, nn.Flatten(), head), images, [0, 1])[0], expected)


def test_refuses_networks_without_a_convolution_to_show():
    images = images_of(1, 1, 8, 8)
    with pytest.raises(ModelError, match="no convolution"):
        grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), images, [0])

    class Ignored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv2d(1, 1, 3), nn.Linear(64, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.convolution(images)
            return self.head(images.flatten(1))

    with pytest.raises(ModelError, match="does not depend"):
        grad_cam(Ignored(), images, [0])


def test_leaves_the_network_as_it_was_and_images_do_not_touch_each_other():
    network, images = network_of("chexnet", width=4), images_of(3, 1, 64, 64)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    together = grad_cam(network, images, [1])
    for index in range(3):
        torch.testing.assert_close(together[index], grad_cam(network, images[index : index + 1], [1])[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.training


@given(arrays(np.float32, (2, 3, 4), elements=st.floats(0, 2.0**100, width=32)))
def test_relative_heat_is_between_0_and_1_and_keeps_its_order(heat):
    found = relative(heat)
    assert found.min() >= 0 and found.max() == (1 if heat.any() else 0)
    assert (np.diff(found.ravel()[np.argsort(heat.ravel())]) >= 0).all()
