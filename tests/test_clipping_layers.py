"""Every layer that the clipping engine knows, and any other, equals a loop over single images."""

from functools import partial

import pytest
import torch
from clipping_reference import assert_clipped, per_sample_reference, squares_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedmed.training.clipping import GradientClipper, correlation, slow_layers
from fedmed.training.clipping.convolutions import convolution, most_by_gram
from fedmed.training.clipping.correlation import Window
from fedmed.training.clipping.linear import linear
from fedmed.training.clipping.patients import patients_of
from fedmed.training.clipping.recording import Recording

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
PATIENTS = torch.tensor([2, 0, 2, 1, 0, 2])


def check(module: nn.Module, images: Tensor, patients: Tensor, *, fallbacks: list[str], max_norm: float = 0.3) -> None:
    weights = torch.linspace(0.2, 1, len(images), dtype=torch.float64)
    targets = torch.linspace(-1, 1, len(images), dtype=torch.float64)[:, None]
    expected = per_sample_reference(module, squares_of, images, targets, patients, weights, {"": max_norm})
    module.zero_grad()
    clipper = GradientClipper(module, max_norm=max_norm)
    assert clipper.fallbacks == fallbacks
    clipped = clipper.accumulate_(squares_of, images, targets, patients, weights)
    assert_clipped(module, clipped.norms, expected)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    axes = draw(st.integers(1, 3))
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 1, 2]))
    channels, outputs = (groups * draw(st.integers(1, 9 if axes == 2 else 3)) for _ in range(2))
    per_axis = [[draw(st.integers(1, 3)) for _ in range(axes)] for _ in range(2)]
    dilation, sides = [draw(st.integers(1, 2)) for _ in range(axes)], [draw(st.integers(5, 7)) for _ in range(axes)]
    settings = {
        "groups": groups,
        "bias": draw(st.booleans()),
        "stride": tuple(per_axis[1]),
        "dilation": tuple(dilation),
    }
    kernel = tuple(per_axis[0])
    padding: object = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    if not transposed and draw(st.booleans()):
        settings["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular"]))
        if max(settings["stride"]) == 1 and draw(st.booleans()):
            padding = "same"
    module = CONVOLUTIONS[axes][transposed](channels, outputs, kernel, padding=padding, **settings)
    return module.double(), (channels, *sides)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # it costs PyTorch a copy
@given(
    made=convolutions(),
    patients=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    first=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_convolutions_of_any_shape(made, patients, first) -> None:
    module, shape = made
    images = torch.randn((len(patients), *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = module if first else nn.Sequential(nn.PReLU().double(), module, nn.Tanh())
    check(network, images, torch.tensor(patients), fallbacks=[])


@st.composite
def correlations(draw: st.DrawFn) -> tuple[Tensor, Tensor, Window]:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 3]))
    kernel, stride, padding, dilation = (
        tuple(draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 3), (1, 2), (0, 2), (1, 2))
    )
    sides = tuple(draw(st.integers(5, 7)) for _ in range(axes))
    width = draw(st.sampled_from([1, 5, 9, 16]))
    window = Window(kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    ends = tuple(
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(sides, padding, dilation, kernel, stride, strict=True)
    )
    drawn = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    maps, points = (
        torch.randn((6, groups * width, *size), generator=drawn, dtype=torch.float64) for size in (sides, ends)
    )
    return maps, points, window


@given(made=correlations(), unit=st.sampled_from([PATIENTS, torch.arange(6)]))
@settings(max_examples=60, deadline=None)
def test_every_form_of_a_weight_gradient_agrees_with_the_plain_one_of_each_patient(made, unit) -> None:
    maps, points, window = made
    patients = patients_of(unit)
    one = torch.stack([correlation.weight_gradient(maps[rows], points[rows], window) for rows in patients.each()])
    squares = one.flatten(1).square().sum(1)
    torch.testing.assert_close(
        correlation.gradients(maps, points, window, patients.blocks), one, rtol=1e-12, atol=1e-11
    )
    by_products = torch.cat([correlation._by_products(maps, points, window, block) for block in patients.blocks])
    torch.testing.assert_close(by_products, one, rtol=1e-12, atol=1e-11)
    by_gram = correlation.squares_by_gram(maps, points, window, patients.blocks)
    torch.testing.assert_close(by_gram, squares, rtol=1e-10, atol=1e-9)
    factors = torch.linspace(0, 1, 6, dtype=torch.float64)
    expected = correlation.weight_gradient(maps, points * factors.view(-1, *[1] * (points.dim() - 1)), window)
    found = correlation.weighted(maps, points, window, factors, None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


def test_form_follows_the_size_of_the_map() -> None:
    window = Window(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)

    def form(channels: int, side: int, images: int = 1) -> str:
        return "gram" if images <= most_by_gram((channels, side, side), (channels, side, side), window) else "kept"

    assert form(512, 2) == form(256, 4) == form(256, 14) == "gram"
    assert form(64, 16) == form(64, 56) == form(16, 512) == form(64, 512) == "kept"
    assert form(256, 14, images=8) == "kept"  # positions of eight images would be paired
    assert form(2048, 32) == "gram"  # a gradient of 38 million numbers for each image would not fit


@pytest.mark.parametrize("side", [224, 512])
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(1, 2, 3),
        nn.Sequential(nn.Conv2d(1, 16, 7, stride=2, padding=3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2)),
        nn.ConvTranspose2d(1, 2, 2, stride=2),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(6), nn.Conv2d(4, 32, 3)),
    ],
    ids=["plain", "first of a ResNet", "transposed", "kept and gram"],
)
def test_images_of_full_size_are_clipped_as_exactly_as_small_ones(module: nn.Module, side: int) -> None:
    images = torch.randn((3, 1, side, side), generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    check(module.double(), images, torch.tensor([0, 1, 0]), fallbacks=[])


def rows_by_gram(layer: str, images: list[int]) -> int:
    """Of patients with so many images each, the images whose gradient of a layer is not kept."""
    patients = patients_of(torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images)))
    module = nn.Conv2d(64, 64, 3, padding=1, bias=False) if layer == "convolution" else nn.Linear(40, 40, bias=False)
    recording = Recording(patients, {module.weight: 0})
    rows = torch.ones(sum(images), 64, 5, 5) if layer == "convolution" else torch.ones(sum(images), 10, 40)
    forward = convolution("", module) if layer == "convolution" else partial(linear, "", module)
    forward(recording, rows).sum().backward()
    for products, uses in recording.products.values():
        products(uses)
    count = recording.later[module.weight][0] if module.weight in recording.later else 0
    kept = recording.kept.get(module.weight, ())
    assert len(recording.squares[0]) == len(images) and sum(sorted(images)[: len(images) - len(kept)]) == count
    return count


@pytest.mark.parametrize("layer", ["convolution", "linear"])
@given(images=st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_p07_the_form_of_a_norm_follows_from_the_patients_own_images(layer, images) -> None:
    alone = {count: rows_by_gram(layer, [count]) for count in range(1, 6)}
    assert alone[1] == 1 and alone[5] == 0, "both forms"
    assert rows_by_gram(layer, images) == sum(alone[count] for count in images)


@pytest.mark.parametrize(
    "module",
    [
        nn.GroupNorm(2, 4),
        nn.GroupNorm(1, 4, affine=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm((4, 6, 5)),
        nn.LayerNorm(5, bias=False),
        nn.PReLU(),
        nn.PReLU(4),
        nn.BatchNorm2d(4).eval(),
        nn.Linear(5, 3),
        nn.Linear(5, 3, bias=False),
        nn.Sequential(nn.Flatten(), nn.Linear(120, 7), nn.PReLU(7), nn.GroupNorm(1, 7), nn.LayerNorm(7)),
    ],
    ids=str,
)
def test_layers_with_few_parameters(module: nn.Module) -> None:
    images = torch.randn((6, 4, 6, 5), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    check(module.double(), images, PATIENTS, fallbacks=[])
    check(nn.Sequential(nn.Conv2d(4, 4, 1), module).double(), images, PATIENTS, fallbacks=[])


class Head(nn.Module):
    """Gives the outputs of a recurrent or attention layer only."""

    def __init__(self, layer: nn.Module, *more: str) -> None:
        super().__init__()
        self.layer, self.copies = layer, 3 if isinstance(layer, nn.MultiheadAttention) else 1

    def forward(self, sequence: Tensor) -> Tensor:
        output, state = self.layer(*[sequence] * self.copies)
        if isinstance(self.layer, nn.RNNBase):  # (layers, n, units)
            for part in state if isinstance(state, tuple) else (state,):
                output = output + part.sum((0, 2))[:, None, None]
        return output


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(4, 3, batch_first=True),
        nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True),
        nn.LSTM(4, 2, bias=False, batch_first=True),
    ],
    ids=str,
)
def test_lstm_equals_torchs_own(module: nn.LSTM) -> None:
    sequence = torch.randn((6, 5, 4), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    check(Head(module.double()), sequence, PATIENTS, fallbacks=[])


def test_lstm_that_reads_steps_first() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3)

        def forward(self, sequence: Tensor) -> Tensor:
            return self.lstm(sequence.transpose(0, 1))[0].transpose(0, 1)

    sequence = torch.randn((6, 5, 4), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    check(Turned().double(), sequence, PATIENTS, fallbacks=[])


class Scaled(nn.Conv2d):
    """A known layer with a forward pass of its own."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Standardized(nn.Conv2d):
    """A known layer that changes a part of its forward pass."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(images, weight - weight.mean(), bias)


class Square(nn.Conv2d):
    """A known layer that is only made otherwise."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)


class Position(nn.Module):
    """A network with a parameter of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(rows + self.place)


@pytest.mark.parametrize(
    ("module", "shape", "name"),
    [
        (Head(nn.GRU(4, 3, num_layers=2, batch_first=True)), (5, 4), "layer"),
        (Head(nn.LSTM(4, 3, proj_size=2, batch_first=True)), (5, 4), "layer"),
        (Head(nn.MultiheadAttention(4, 2, batch_first=True)), (5, 4), "layer"),
        (nn.Sequential(Scaled(4, 3, 3), nn.GroupNorm(1, 3)), (4, 5, 5), "0"),
        (nn.Sequential(Standardized(4, 3, 3), nn.GroupNorm(1, 3)), (4, 5, 5), "0"),
        (nn.Sequential(nn.Linear(4, 4), Position()), (4,), "1"),
        (nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 3))), (4,), "1"),
    ],
    ids=["GRU", "LSTM with projection", "attention", "own forward", "own part of it", "own parameter", "weight norm"],
)
def test_any_other_layer_is_run_patient_by_patient_and_named(module: nn.Module, shape, name: str) -> None:
    images = torch.randn((6, *shape), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    check(module.double(), images, PATIENTS, fallbacks=[name])


def test_a_layer_that_is_only_made_otherwise_is_a_known_one() -> None:
    images = torch.randn((6, 4, 5, 5), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    check(nn.Sequential(Square(4), nn.GroupNorm(1, 4)).double(), images, PATIENTS, fallbacks=[])


def test_layers_that_are_run_patient_by_patient_are_named_by_their_class() -> None:
    normed = parametrizations.weight_norm(nn.Linear(4, 3))
    slow = slow_layers(nn.Sequential(nn.Linear(4, 4), Position(), nn.GRU(4, 3, batch_first=True), normed))
    assert slow.startswith("gradients of GRU, ParametrizedLinear, Position are made patient by patient")
    assert slow_layers(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3))) == ""


class Twice(nn.Module):
    """Reads its layers several times."""

    def __init__(self, layer: nn.Module, *, turned: bool = False) -> None:
        super().__init__()
        self.layer, self.turned = layer, turned

    def forward(self, rows: Tensor) -> Tensor:
        once = torch.tanh(self.layer(rows))
        return self.layer(once) + self.layer(rows.flip(-1))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Twice(nn.Conv2d(3, 3, 3, padding=1)), (3, 5, 5)),
        (Twice(nn.Linear(5, 5)), (5,)),
        (Twice(nn.GroupNorm(1, 3)), (3, 5)),
        (Twice(nn.Sequential(nn.Conv1d(3, 3, 1), nn.PReLU(3), nn.InstanceNorm1d(3, affine=True))), (3, 5)),
    ],
    ids=["convolution", "linear", "norm", "several"],
)
def test_layers_that_are_read_several_times(module: nn.Module, shape) -> None:
    images = torch.randn((6, *shape), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    check(module.double(), images, PATIENTS, fallbacks=[])


def test_parameters_that_layers_of_several_kinds_share() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), Position(), nn.Linear(3, 4))
    network[2].weight = network[0].weight
    network[3].weight = network[4].place
    network[5].weight = nn.Parameter(torch.randn(4, 3))
    network[4].inner.bias = nn.Parameter(torch.randn(3))
    network[2].bias = network[3].bias
    images = torch.randn((6, 4), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    check(network.double(), images, PATIENTS, fallbacks=["4"])


def test_convolutions_with_a_shared_weight() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=2), nn.ConvTranspose2d(2, 2, 3))
    network[2].weight = network[3].weight = network[0].weight
    images = torch.randn((6, 2, 6, 6), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    check(network.double(), images, PATIENTS, fallbacks=[])
