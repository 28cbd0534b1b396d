"""The clipping engine's promises: sensitivity, no coupling, refusals, and its place below Opacus' optimizer."""

import copy

import pytest
import torch
from clipping_reference import assert_clipped, per_sample_reference, squares_of
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from test_models_per_sample import CASES, KINDS, small
from torch import Tensor, nn

from fedmed.errors import ModelError
from fedmed.models.small_cnn import small_cnn
from fedmed.training.clipping import GradientClipper
from fedmed.training.clipping.optimizer import ClippedSumOptimizer


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.PReLU(6), nn.Flatten(), nn.Linear(54, 2),
    )  # fmt: skip


def images_of(rows: int, seed: int = 1, side: int = 6) -> Tensor:
    return torch.randn((rows, 1, side, side), generator=torch.Generator().manual_seed(seed))


def sum_of(
    module: nn.Module, images: Tensor, patients: Tensor, max_norm: float, weights: Tensor | None = None
) -> Tensor:
    module.zero_grad()
    GradientClipper(module, max_norm=max_norm).accumulate_(squares_of, images, images, patients, weights)
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


@given(
    counts=st.lists(st.sampled_from([1, 2, 3, 7, 50]), min_size=1, max_size=6),
    removed=st.integers(0, 5),
    max_norm=st.sampled_from([1e-3, 0.1, 1e3]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_p06_removing_one_patient_moves_the_sum_by_at_most_the_bound(counts, removed, max_norm, seed) -> None:
    module = network(seed).double()
    patients = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    patients = patients[torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed))]
    images = images_of(len(patients), seed).double() * 10
    left = patients != removed % len(counts)
    whole = sum_of(module, images, patients, max_norm)
    rest = sum_of(module, images[left], patients[left], max_norm)
    assert float((whole - rest).norm()) <= max_norm * (1 + 1e-9)


def test_p06_the_bound_is_reached_and_small_gradients_are_left_alone() -> None:
    module, images, patients = network().double(), images_of(50).double(), torch.zeros(50, dtype=torch.int64)
    assert float(sum_of(module, images, patients, 0.01).norm()) == pytest.approx(0.01, rel=1e-12)
    module.zero_grad()
    squares_of(module(images), images).sum().backward()
    plain = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    torch.testing.assert_close(sum_of(module, images, patients, 1e6), plain, rtol=1e-9, atol=1e-9)


@KINDS
def test_p07_no_patient_changes_a_bit_of_another_patients_clipped_gradient(name: str, dimensions: int) -> None:
    """One patient's images become others of the same shape; the sum of each other patient alone stays the same."""
    module = small(name, dimensions, "group").float()
    images = torch.randn((5, 1, *CASES[name, dimensions][1]), generator=torch.Generator().manual_seed(8))
    patients = torch.tensor([0, 1, 2, 1, 2])
    other = images.clone()
    other[[1, 3]] = 100 * torch.randn_like(other[[1, 3]])
    clipper = GradientClipper(module, max_norm=0.1)
    norms, alone = [], []
    for given_images in (images, other):
        module.zero_grad()
        norms.append(clipper.accumulate_(squares_of, given_images, given_images, patients).norms)
        for kept in (0, 2):
            module.zero_grad()
            clipper.accumulate_(squares_of, given_images, given_images, patients, (patients == kept).float())
            alone.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert torch.equal(norms[0][[0, 2]], norms[1][[0, 2]])
    assert norms[0][1] != norms[1][1]
    assert torch.equal(alone[0], alone[2]) and torch.equal(alone[1], alone[3])
    assert float(alone[0].norm()) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_p06_a_patient_whose_gradient_is_not_finite_adds_nothing(bad: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(small_cnn(width=16, outputs=3), nn.Linear(3, 3), nn.LSTM(3, 2, batch_first=True))
    module = nn.Sequential(module[0], module[1])
    images = images_of(6, side=16)
    patients = torch.tensor([0, 1, 2, 1, 0, 2])
    broken = images.clone()
    broken[3] = bad
    found = sum_of(module, broken, patients, 0.1)
    left = patients != 1
    torch.testing.assert_close(found, sum_of(module, images[left], patients[left], 0.1), rtol=1e-4, atol=1e-6)
    norms = GradientClipper(module, max_norm=0.1).accumulate_(squares_of, broken, images, patients).norms
    assert norms.isfinite().tolist() == [True, False, True]


def test_empty_batch_leaves_zeros_and_adds_nothing() -> None:
    module = network()
    clipper = GradientClipper(module, max_norm=1.0)
    clipped = clipper.accumulate_(squares_of, images_of(0), images_of(0), torch.empty(0, dtype=torch.int64))
    assert clipped.norms.shape == (0,) and clipped.losses.shape == (0,)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_sums_of_physical_batches_add_up() -> None:
    module, images, patients = network().double(), images_of(9).double(), torch.arange(9) // 3
    whole = sum_of(module, images, patients, 0.1)
    module.zero_grad()
    clipper = GradientClipper(module, max_norm=0.1)
    for part in (slice(0, 6), slice(6, 9), slice(0, 0)):
        clipper.accumulate_(squares_of, images[part], images[part], patients[part])
    found = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_bounds_for_groups_of_parameters_clip_each_group_alone() -> None:
    module, images = small_cnn(width=4).double(), images_of(6, side=16).double()
    patients, weights = torch.tensor([0, 1, 1, 2, 0, 0]), torch.rand(6, dtype=torch.float64)
    bounds = {"block": 0.02, "classifier.weight": 0.5, "classifier.bias": 1e-3}
    expected = per_sample_reference(module, squares_of, images, images, patients, weights, bounds)
    module.zero_grad()
    clipped = GradientClipper(module, max_norm=bounds).accumulate_(squares_of, images, images, patients, weights)
    assert clipped.norms.shape == (3, 3)
    assert_clipped(module, clipped.norms, expected)


def test_the_bound_may_change_between_batches() -> None:
    module, images, patients = network().double(), images_of(4).double(), torch.zeros(4, dtype=torch.int64)
    clipper = GradientClipper(module, max_norm=0.01)
    for bound in (0.02, 0.005):
        module.zero_grad()
        clipper.max_norm = bound
        clipper.accumulate_(squares_of, images, images, patients)
        norm = torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm()
        assert float(norm) == pytest.approx(bound, rel=1e-12)


def test_the_network_is_as_it_was_between_batches_and_after_errors() -> None:
    module = network()
    clipper = GradientClipper(module, max_norm=1.0)
    clipper.accumulate_(squares_of, images_of(2), images_of(2), torch.arange(2))
    assert not any("forward" in layer.__dict__ for layer in module.modules())
    with pytest.raises(ModelError, match="expected one for each"):
        clipper.accumulate_(lambda outputs, targets: outputs.mean(), images_of(2), images_of(2), torch.arange(2))
    assert not any("forward" in layer.__dict__ for layer in module.modules())
    copy.deepcopy(module)(images_of(2)).sum().backward()


# Below Opacus


def steps(module: nn.Module, engine: str, batches: list[list[Tensor]], noise: float) -> Tensor:
    """Weights after optimizer steps, each on the physical batches of one list."""
    plain = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    make = {"hooks": DPOptimizer, "copied": DPOptimizerFastGradientClipping, "ours": ClippedSumOptimizer}[engine]
    optimizer = make(
        plain, noise_multiplier=noise, max_grad_norm=0.5, expected_batch_size=5,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    accountant = RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    hooked = GradSampleModule(module, loss_reduction="sum") if engine == "hooks" else None
    clipper = GradientClipper(module, max_norm=0.5)
    for physical in batches:
        for images in physical:
            optimizer.zero_grad()
            optimizer.signal_skip_step(do_skip=images is not physical[-1])
            if hooked is not None:
                squares_of(hooked(images.clone().requires_grad_()), images).sum().backward()
            else:
                clipper.accumulate_(squares_of, images, images, torch.arange(len(images)))
            optimizer.step()
    assert sum(count for _, _, count in accountant.history) == len(batches)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("noise", [0.0, 1.3])
def test_training_below_opacus_optimizer_equals_training_with_opacus_hooks(noise: float) -> None:
    batches = [[images_of(5, 1)], [images_of(4, 2), images_of(3, 3)], [images_of(1, 4)]]
    ours, copied, theirs = (steps(network(), engine, batches, noise) for engine in ("ours", "copied", "hooks"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, copied)
    assert not torch.allclose(ours, torch.cat([p.flatten() for p in network().parameters()]))


def test_a_sum_is_noised_once() -> None:
    module = network()
    optimizer = ClippedSumOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=0.5, expected_batch_size=5
    )
    clipper = GradientClipper(module, max_norm=0.5)
    clipper.accumulate_(squares_of, images_of(3), images_of(3), torch.arange(3))
    optimizer.step()
    clipper.accumulate_(squares_of, images_of(3), images_of(3), torch.arange(3))
    with pytest.raises(ValueError, match="haven't been cleared"):  # zero_grad was forgotten
        optimizer.step()


def test_an_empty_poisson_batch_is_a_step_of_noise_alone() -> None:
    module = network()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    steps(module, "ours", [[images_of(0)]], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    steps(module, "ours", [[images_of(0)]], 1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


# Half precision


def test_bfloat16_changes_gradients_little_and_the_bound_hardly() -> None:
    torch.manual_seed(0)
    module, images, patients = small_cnn(width=16), images_of(8, side=32), torch.arange(8) // 2
    whole = sum_of(module, images, patients, 1e6)
    module.zero_grad()
    clipper = GradientClipper(module, max_norm=1e6, precision="bfloat16")
    clipper.accumulate_(squares_of, images, images, patients)
    half = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    assert 0 < float((half - whole).norm()) < 0.05 * float(whole.norm())
    module.zero_grad()
    one = torch.zeros(8, dtype=torch.int64)
    GradientClipper(module, max_norm=0.01, precision="bfloat16").accumulate_(squares_of, images, images, one)
    norm = torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_gives_what_the_cpu_gives_in_either_memory_format(precision) -> None:
    torch.manual_seed(0)
    module, images, patients = small_cnn(width=16), images_of(8, side=32), torch.tensor([0, 1, 1, 2, 2, 3, 3, 3])
    expected = sum_of(module, images, patients, 0.1)
    module, images, patients = module.cuda(), images.cuda(), patients.cuda()
    for given_images in (images, images.contiguous(memory_format=torch.channels_last)):
        module.zero_grad()
        clipper = GradientClipper(module, max_norm=0.1, precision=precision)
        clipper.accumulate_(squares_of, given_images, given_images, patients)
        found = torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).cpu()
        close = 1e-3 if precision == "float32" else 0.1
        assert float((found - expected).norm()) < close * float(expected.norm())


# Refusals


class Reader(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(36, 36)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.flatten(1)) @ self.inner.weight


class Windows(nn.Module):
    """Makes windows of images rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(18, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.reshape(-1, 18)).reshape(len(images), -1)


class InPlace(nn.Module):
    """Changes what its convolution was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        given_maps = torch.tanh(images)
        return self.first(given_maps) + given_maps.mul_(2)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "BatchNorm in training mixes"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False).eval()), "BatchNorm"),
        (nn.InstanceNorm2d(1, affine=True, track_running_stats=True), "track_running_stats=False"),
        (Reader(), "inner.weight is read outside"),
        (Windows(), "layer inner was given 4 rows for 2 images"),
        (InPlace(), "layer first was given was changed in place"),
    ],
    ids=["batch norm", "batch norm without statistics", "instance norm", "direct use", "windows", "in place"],
)
def test_refuses_what_it_cannot_clip(module: nn.Module, sentence: str) -> None:
    clipper = GradientClipper(module, max_norm=1.0)
    with pytest.raises(ModelError, match=sentence):
        clipper.accumulate_(squares_of, images_of(2), images_of(2), torch.arange(2))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_an_activation_in_place_after_a_layer_is_right() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True))
    weights, images = torch.rand(3, dtype=torch.float64), images_of(3).double()
    module = module.double()
    expected = per_sample_reference(module, squares_of, images, images, torch.arange(3), weights, {"": 0.1})
    module.zero_grad()
    clipped = GradientClipper(module, max_norm=0.1).accumulate_(squares_of, images, images, torch.arange(3), weights)
    assert_clipped(module, clipped.norms, expected)


def test_refuses_bounds_and_layers_when_it_is_made() -> None:
    for bound in (0.0, -1.0, 1e-13, float("nan")):
        with pytest.raises(ModelError, match="1e-12 or more"):
            GradientClipper(network(), max_norm=bound)
    clipper = GradientClipper(network(), max_norm=1.0)
    with pytest.raises(ModelError, match="1e-12 or more"):
        clipper.max_norm = 0.0
    with pytest.raises(ModelError, match="in 0 of the groups"):
        GradientClipper(network(), max_norm={"0.": 1.0})
    with pytest.raises(ModelError, match="in 2 of the groups"):
        GradientClipper(network(), max_norm={"": 1.0, "0.": 1.0})
    with pytest.raises(ModelError, match="batch_first=True"):
        GradientClipper(nn.GRU(3, 3), max_norm=1.0)
    with pytest.raises(ModelError, match="nothing to train"):
        GradientClipper(network().requires_grad_(False), max_norm=1.0)
