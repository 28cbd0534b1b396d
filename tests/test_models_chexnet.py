"""DenseNet-121 against the paper's parameter count and against torchvision's network of the same names."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import DenseNet, densenet121

from fedmed.errors import ModelError
from fedmed.models.chexnet import chexnet


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, DenseNet]:
    """Ours and torchvision's with equal weights, and batch statistics that are not the initial ones."""
    theirs = densenet121(num_classes=14)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    ours = chexnet()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_has_the_published_number_of_parameters(norm: str) -> None:
    assert sum(p.numel() for p in chexnet(norm=norm).parameters()) == 6_968_206


def test_state_has_torchvisions_names_in_torchvisions_order(pair: tuple[torch.nn.Module, DenseNet]) -> None:
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_initial_weights_are_torchvisions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ours = chexnet().state_dict()
        torch.manual_seed(3)
        theirs = densenet121(num_classes=14).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluates_as_torchvision(pair: tuple[torch.nn.Module, DenseNet], images: torch.Tensor) -> None:
    ours, theirs = pair
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_trains_as_torchvision(pair: tuple[torch.nn.Module, DenseNet], images: torch.Tensor) -> None:
    ours, theirs = (network.train().double() for network in pair)
    images = images.double()
    outputs = ours(images), theirs(images)
    torch.testing.assert_close(*outputs)
    for logits in outputs:
        logits.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-8)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):  # running statistics after one step
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
def test_papers_image_gives_fourteen_logits() -> None:
    with torch.no_grad():
        assert chexnet()(torch.randn(1, 3, 224, 224)).shape == (1, 14)


def test_width_is_the_growth_rate() -> None:
    network = chexnet(in_channels=1, outputs=5, norm="group", width=8)
    assert network.get_parameter("features.conv0.weight").shape == (16, 1, 7, 7)
    assert network.get_parameter("features.denseblock1.denselayer1.conv2.weight").shape == (8, 32, 3, 3)
    assert network(torch.zeros(2, 1, 32, 48)).shape == (2, 5)


@pytest.mark.parametrize(("norm", "smallest"), [("batch", 29), ("group", 29), ("instance", 61), ("none", 29)])
def test_smallest_image_runs_and_a_smaller_one_is_refused(norm: str, smallest: int) -> None:
    network = chexnet(in_channels=1, outputs=1, norm=norm, width=2)
    assert network(torch.randn(2, 1, smallest, smallest)).isfinite().all()
    with pytest.raises(ModelError, match=f"at least {smallest} x {smallest} pixels"):
        network(torch.zeros(2, 1, smallest - 1, 64))
