"""VGG-16 against the paper's parameter count and against torchvision's network of the same names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision

from fedmed.errors import ModelError
from fedmed.models.vgg16 import vgg16


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def test_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in vgg16().parameters()) == 138_357_544
        assert sum(p.numel() for p in vgg16(norm="batch").parameters()) == 138_365_992  # torchvision's vgg16_bn


@pytest.mark.parametrize(("norm", "name"), [("none", "vgg16"), ("batch", "vgg16_bn")])
def test_state_has_torchvisions_names_and_shapes_in_torchvisions_order(norm: str, name: str) -> None:
    with torch.device("meta"):
        ours, theirs = vgg16(norm=norm).state_dict(), getattr(torchvision.models, name)().state_dict()
    assert [(key, t.shape) for key, t in ours.items()] == [(key, t.shape) for key, t in theirs.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "name"), [("none", "vgg16"), ("batch", "vgg16_bn")])
def test_initial_weights_and_outputs_on_the_papers_image_are_torchvisions(norm: str, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ours = vgg16(norm=norm)
        torch.manual_seed(3)
        theirs = getattr(torchvision.models, name)()
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    for side in (224, 96):
        images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_width_is_the_first_blocks() -> None:
    network = vgg16(in_channels=1, outputs=3, norm="group", width=2)
    assert network.get_parameter("features.0.weight").shape == (2, 1, 3, 3)
    assert network.get_parameter("classifier.0.weight").shape == (128, 7 * 7 * 16)
    assert network(torch.randn(2, 1, 32, 70)).shape == (2, 3)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
def test_smallest_image_runs_and_a_smaller_one_is_refused(norm: str) -> None:
    network = vgg16(in_channels=1, outputs=1, norm=norm, width=2)
    assert network(torch.randn(2, 1, 32, 32)).isfinite().all()
    with pytest.raises(ModelError, match="at least 32 x 32 pixels"):
        network(torch.zeros(2, 1, 31, 64))


def test_dense_layers_drop_out_in_training_only() -> None:
    network = vgg16(in_channels=1, outputs=1, width=2)
    images = torch.randn(1, 1, 32, 32)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))
