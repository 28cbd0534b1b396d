"""ResNet-50 against the paper's parameter count and against torchvision's network of the same names."""

from __future__ import annotations

import pytest
import torch
import torchvision

from fedmed.errors import ModelError
from fedmed.models.resnet50 import resnet50


def test_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in resnet50().parameters()) == 25_557_032
        assert sum(p.numel() for p in resnet50(norm="group").parameters()) == 25_557_032


def test_state_has_torchvisions_names_and_shapes_in_torchvisions_order() -> None:
    with torch.device("meta"):
        ours, theirs = resnet50(outputs=9).state_dict(), torchvision.models.resnet50(num_classes=9).state_dict()
    assert [(name, t.shape) for name, t in ours.items()] == [(name, t.shape) for name, t in theirs.items()]


def test_initial_weights_outputs_and_gradients_are_torchvisions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ours = resnet50(outputs=5)
        torch.manual_seed(3)
        theirs = torchvision.models.resnet50(num_classes=5)
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    outputs = [network.train()(images) for network in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    for logits in outputs:
        logits.square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()), msg=name
        )
    with torch.no_grad():  # with the running statistics after one step
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.slow
def test_papers_image_gives_a_thousand_logits() -> None:
    with torch.no_grad():
        assert resnet50()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_width_is_the_stems() -> None:
    network = resnet50(in_channels=2, outputs=7, norm="group", width=4)
    assert network.get_parameter("conv1.weight").shape == (4, 2, 7, 7)
    assert network.get_parameter("layer4.2.conv3.weight").shape == (128, 32, 1, 1)
    assert network(torch.randn(2, 2, 40, 33)).shape == (2, 7)


@pytest.mark.parametrize(("norm", "smallest"), [("batch", 1), ("group", 1), ("instance", 33), ("none", 1)])
def test_smallest_image_runs_and_a_smaller_one_is_refused(norm: str, smallest: int) -> None:
    network = resnet50(in_channels=1, outputs=1, norm=norm, width=2)
    assert network(torch.randn(2, 1, smallest, smallest)).isfinite().all()
    if smallest > 1:
        with pytest.raises(ModelError, match=f"at least {smallest} x {smallest} pixels"):
            network(torch.zeros(2, 1, smallest - 1, 64))
