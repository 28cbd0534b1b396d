"""No rounding hides a gradient: networks whose large terms cancel do not let a patient pass the bound."""

import pytest
import torch
from torch import Tensor, nn

from fedmed.models.small_cnn import small_cnn
from fedmed.training.clipping import GradientClipper
from fedmed.training.clipping.rounding import scaled, squares_above


def convolved(mean: float, *, width: int = 128) -> nn.Module:
    """Activations with a large mean before a convolution whose output gradients add up to nothing."""
    network = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width, affine=True), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * 36, 1),
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


@pytest.mark.parametrize("bound", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("gradient", [1e19, 1e21, 1e24])
def test_p06_activations_too_small_to_be_squared_do_not_hide_a_gradient(bound, gradient) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 256, 3, padding=1, bias=False), nn.GroupNorm(8, 256), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.GroupNorm(8, 256), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 1),
    )  # fmt: skip
    with torch.no_grad():
        network[1].weight.fill_(6e-24)
        network[3].weight.zero_()
        network[4].weight.fill_(gradient / (0.25 * bound))
        network[4].bias.fill_(1e-9)
        network[-1].weight.mul_(bound)
        network[-1].bias.fill_(bound / 10)
    images = torch.rand(1, 1, 4, 4)
    clipper = GradientClipper(network, max_norm=bound)
    clipper.accumulate_(loss_of, images, images, torch.zeros(1, dtype=torch.int64))
    released = torch.cat([each.grad.double().flatten() for each in network.parameters()]).norm()
    assert float(released) <= 1.01 * bound


def test_p06_rows_of_a_patient_that_cancel_move_nobody_elses_gradient() -> None:
    torch.manual_seed(0)
    network = small_cnn(norm="group", outputs=1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(0 if "block" in name and parameter.ndim > 1 else 1)
        network.classifier.weight.fill_(1e10)
        last = [layer for layer in network.block4.modules() if isinstance(layer, nn.GroupNorm)][-1]
        last.weight.zero_()
        last.bias.fill_(1e-25)
    images, patients = torch.rand(12, 1, 16, 16), torch.arange(12) // 2
    targets = torch.ones(12, 1)
    targets[11] = 0  # two examinations of the last patient contradict each other

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)

    found = []
    for count in (12, 10):
        network.zero_grad()
        GradientClipper(network, max_norm=1.0).accumulate_(loss, images[:count], targets[:count], patients[:count])
        found.append(torch.cat([each.grad.double().flatten() for each in network.parameters()]))
    assert float((found[0] - found[1]).norm()) <= 1.01


def test_p07_a_patient_with_many_images_moves_nobody_elses_norm() -> None:
    torch.manual_seed(0)
    network, images = convolved(1e4, width=32), torch.rand(40, 1, 8, 8)
    weights = torch.cat([torch.ones(32), torch.full((8,), 1 / 8)])
    patients = torch.cat([torch.arange(32), torch.full((8,), 32)])
    norms, sums = [], []
    for count in (32, 40):
        network.zero_grad()
        clipper = GradientClipper(network, max_norm=1.0)
        given = (images[:count], images[:count], patients[:count], weights[:count])
        norms.append(clipper.accumulate_(loss_of, *given).norms[:32])
        sums.append(torch.cat([each.grad.double().flatten() for each in network.parameters()]))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)
    assert float((sums[0] - sums[1]).norm()) <= 1.01


def test_a_square_is_rounded_up_by_little_where_nothing_cancels() -> None:
    torch.manual_seed(0)
    (inputs, _), (gradients, _) = scaled(torch.randn(5, 16, 300)), scaled(torch.randn(5, 16, 40))
    exact = torch.bmm(gradients.double().mT, inputs.double()).square().sum((1, 2))
    found = squares_above(inputs @ inputs.mT, gradients @ gradients.mT, depths=(300, 40)).double()
    assert (found >= exact).all() and (found <= exact * 1.002).all()
