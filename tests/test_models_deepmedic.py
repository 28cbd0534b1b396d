"""DeepMedic against the paper: parameters, segment sizes, what a prediction sees."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from fedmed.models.deepmedic import CONTEXT, deepmedic, fitted

CHANNELS = (30, 30, 40, 40, 40, 40, 50, 50)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


@pytest.mark.parametrize(("in_channels", "outputs"), [(1, 2), (4, 5)])
def test_parameter_count_by_hand(in_channels: int, outputs: int) -> None:
    pathway = 27 * in_channels * 30
    for before, after in pairwise(CHANNELS):
        pathway += 3 * before + 27 * before * after  # scale, shift and PReLU slope of each map; kernels
    dense = (3 * 100 + 100 * 150) + (3 * 150 + 150 * 150)
    classifier = 3 * 150 + 150 * outputs + outputs
    with torch.device("meta"):
        plain, residual = (deepmedic(in_channels=in_channels, outputs=outputs, residual=r) for r in (False, True))
    assert sum(p.numel() for p in plain.parameters()) == 2 * pathway + dense + classifier
    assert sum(p.numel() for p in residual.parameters()) == 2 * pathway + dense + classifier
    assert (in_channels, outputs) != (1, 2) or 2 * pathway + dense + classifier == 657_842


def test_has_eleven_layers_on_each_way_from_image_to_label() -> None:
    with torch.device("meta"):
        network = deepmedic()
    convolutions = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv3d)]
    low, normal = (sum(name.startswith(pathway) for name in convolutions) for pathway in ("low", "normal"))
    assert low == normal == 8
    assert len(convolutions) - low - normal + 8 == 11


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_papers_segment_of_57_voxels_gives_9_predictions(dimensions: int, residual: bool) -> None:
    network = deepmedic(norm="group", width=2, dimensions=dimensions, residual=residual)
    with torch.no_grad():
        assert network.segment(torch.randn(1, 1, *[57] * dimensions)).shape == (1, 2, *[9] * dimensions)
        assert network.normal(torch.randn(1, 1, *[25] * dimensions)).shape == (1, 3, *[9] * dimensions)
        assert network.low(torch.randn(1, 1, *[19] * dimensions)).shape == (1, 3, *[3] * dimensions)


@pytest.mark.slow
def test_papers_network_predicts_a_segment_of_its_own_size() -> None:
    with torch.no_grad():
        assert deepmedic(in_channels=4, outputs=5)(torch.randn(1, 4, 25, 25, 25)).shape == (1, 5, 25, 25, 25)


@pytest.mark.parametrize("sides", [(1, 1), (7, 10), (3, 4, 5)])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_masks_have_the_size_of_their_images(norm: str, sides: tuple[int, ...]) -> None:
    network = deepmedic(in_channels=2, outputs=3, norm=norm, width=2, dimensions=len(sides), residual=True)
    assert network(torch.randn(2, 2, *sides)).shape == (2, 3, *sides)


def test_padding_is_with_zeros_around() -> None:
    network = deepmedic(norm="none", width=3, dimensions=2).eval()
    images = torch.randn(1, 1, 7, 5)
    context = torch.zeros(1, 1, 9 + 2 * CONTEXT, 6 + 2 * CONTEXT)
    context[..., CONTEXT : CONTEXT + 7, CONTEXT : CONTEXT + 5] = images
    torch.testing.assert_close(network(images), network.segment(context)[..., :7, :5])


def test_pathways_see_17_and_51_voxels_around() -> None:
    network = deepmedic(norm="none", width=6, dimensions=2).double().eval()
    for parameter in network.parameters():
        parameter.data.abs_()  # so that nothing is switched off or cancels out
    images = torch.rand(1, 1, 75, 75, dtype=torch.float64, requires_grad=True)
    network.segment(images)[0, 0, 13, 13].backward()  # predictions 27², of which this is the pixel (37, 37)
    seen = images.grad[0, 0].nonzero()
    assert seen.min(dim=0).values.tolist() == [37 - 25] * 2
    assert seen.max(dim=0).values.tolist() == [37 + 25] * 2
    for parameter in network.low.parameters():
        parameter.data.zero_()
    images.grad = None
    network.segment(images)[0, 0, 13, 13].backward()
    seen = images.grad[0, 0].nonzero()
    assert seen.min(dim=0).values.tolist() == [37 - 8] * 2
    assert seen.max(dim=0).values.tolist() == [37 + 8] * 2


def test_residual_connections_pass_what_the_layer_before_was_given() -> None:
    network = deepmedic(norm="none", width=6, dimensions=2, residual=True).eval()
    pathway = network.normal
    images = torch.randn(1, 1, 25, 25)
    for number in range(1, 7):  # layers 3 to 8 give nothing of their own
        torch.nn.init.zeros_(pathway.rest[number][-1].weight)
    second = pathway.rest[0](pathway.first(images))
    expected = torch.zeros(1, 10, 9, 9)
    expected[:, :6] = second[..., 6:15, 6:15]
    torch.testing.assert_close(pathway(images), expected)


def test_fitted_cuts_the_middle_and_appends_empty_maps() -> None:
    earlier = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert fitted(earlier, torch.zeros(1, 3, 3, 3))[0, 0].tolist() == earlier[0, 0, 1:4, 1:4].tolist()
    assert not fitted(earlier, torch.zeros(1, 3, 3, 3))[0, 1:].any()


def test_proportions_follow_the_first_layer() -> None:
    with torch.device("meta"):
        network = deepmedic(width=6, dimensions=3)
    assert network.get_parameter("normal.rest.6.2.weight").shape == (10, 10, 3, 3, 3)
    assert network.get_parameter("dense2.3.weight").shape == (30, 30, 1, 1, 1)
