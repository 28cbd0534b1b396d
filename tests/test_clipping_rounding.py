"""No rounding hides a gradient: networks whose large terms cancel do not let a patient pass the bound."""

import pytest
import torch
from torch import Tensor, nn

from fedmed.training.clipping import GradientClipper
from fedmed.training.clipping.rounding import squares_above


def convolved(mean: float) -> nn.Module:
    """Activations with a large mean before a convolution whose output gradients add up to nothing."""
    network = nn.Sequential(
        nn.Conv2d(1, 128, 3, padding=1), nn.Conv2d(128, 128, 3), nn.InstanceNorm2d(128, affine=True), nn.ReLU(),
        nn.Flatten(), nn.Linear(128 * 36, 1),
    )  # fmt: skip
    with torch.no_grad():
        network[0].bias.fill_(mean)
        network[0].weight.mul_(10)
        network[1].weight.mul_(0.01)
        network[-1].weight.mul_(100)
    return network


def recurrent(mean: float) -> nn.Module:
    """The same over the steps of a sequence."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(8, 256), nn.Linear(256, 64), nn.InstanceNorm1d(64)

        def forward(self, images: Tensor) -> Tensor:
            steps = self.second(self.first(images[:, 0]))  # (n, T, 64)
            return self.norm(steps.transpose(1, 2)).square() * torch.linspace(0, 100, 64)[:, None]

    network = Steps()
    with torch.no_grad():
        network.first.bias.fill_(mean)
    return network


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(1).square().mean(1)


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e6, 1e10])
@pytest.mark.parametrize("make", [convolved, recurrent])
def test_p06_large_means_do_not_hide_a_gradient(make, mean) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        network = make(mean)
        images = torch.rand(2, 1, 8, 8)
        for patients in (torch.zeros(2, dtype=torch.int64), torch.arange(2)):
            network.zero_grad()
            GradientClipper(network, max_norm=1.0).accumulate_(loss_of, images, images, patients)
            released = torch.cat([each.grad.flatten() for each in network.parameters()]).norm()
            assert float(released) <= 1.01 * len(patients.unique())


def test_a_square_is_rounded_up_by_little_where_nothing_cancels() -> None:
    torch.manual_seed(0)
    inputs, gradients = torch.randn(5, 16, 300), torch.randn(5, 16, 40)
    exact = torch.bmm(gradients.double().mT, inputs.double()).square().sum((1, 2))
    found = squares_above(inputs @ inputs.mT, gradients @ gradients.mT, depths=(300, 40)).double()
    assert (found >= exact).all() and (found <= exact * 1.002).all()
