"""The clipping engine equals a loop over single images for every network, in patient and image units."""

import pytest
import torch
from clipping_reference import assert_clipped, per_sample_reference, squares_of
from test_models_per_sample import BOTH_NORMS, CASES, KINDS, small, steady
from torch import Tensor, nn

from fedmed.models.deepmedic import deepmedic
from fedmed.models.fusion import late_fusion
from fedmed.models.small_cnn import small_cnn
from fedmed.models.stages import freeze_, stages
from fedmed.models.unet import unet
from fedmed.training.clipping import GradientClipper
from fedmed.training.network import channels_innermost

PATIENTS = torch.tensor([1, 0, 3, 1, 1])  # patient 2 has no image


def batch(sides: tuple[int, ...], rows: int = 5, channels: int = 1) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(11)
    images = torch.randn((rows, channels, *sides), generator=drawn, dtype=torch.float64)
    return images, torch.rand(rows, generator=drawn, dtype=torch.float64) + 0.1


def check(network: nn.Module, images: Tensor, weights: Tensor, patients: Tensor, max_norm: float = 0.5) -> None:
    expected = per_sample_reference(network, squares_of, images, images, patients, weights, {"": max_norm})
    network.zero_grad()
    clipper = GradientClipper(network, max_norm=max_norm)
    assert clipper.fallbacks == []
    clipper.refuse_folding(images[:3])
    clipped = clipper.accumulate_(squares_of, images, images, patients, weights)
    assert_clipped(network, clipped.norms, expected)
    torch.testing.assert_close(clipped.losses, squares_of(network(images), images).detach())


@BOTH_NORMS
def test_clipped_sum_equals_the_loop_by_patient(name: str, dimensions: int, norm: str) -> None:
    images, weights = batch(CASES[name, dimensions][1])
    check(small(name, dimensions, norm), images, weights, PATIENTS)


@KINDS
def test_clipped_sum_equals_the_loop_by_image(name: str, dimensions: int) -> None:
    images, weights = batch(CASES[name, dimensions][1], rows=3)
    check(small(name, dimensions, "group"), images, weights, torch.arange(3))


@pytest.mark.parametrize("patients", [PATIENTS, torch.arange(5)], ids=["in another order", "as they are"])
@pytest.mark.parametrize(("dimensions", "channels"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_with_channels_innermost_the_sum_is_the_same_and_their_order_of_memory_stays(
    dimensions: int, channels: int, patients: Tensor
) -> None:
    network = small_cnn(in_channels=channels, norm="group", width=2, dimensions=dimensions).double().train()
    images, weights = batch((16,) * dimensions, channels=channels)
    given = []
    network.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].stride(1)))
    check(network, channels_innermost(images), weights, patients)
    assert given[-2] == 1, "in the engine's own pass, before the last one of the check"


def test_without_normalization_biases_are_clipped_too() -> None:
    images, weights = batch((16, 16))
    check(small("small-cnn", 2, "none"), images, weights, PATIENTS)


def test_residual_deepmedic() -> None:
    images, weights = batch((3, 3, 3))
    check(steady(deepmedic(norm="group", width=3, residual=True)), images, weights, PATIENTS)


def test_series_of_several_lengths() -> None:
    images, weights = batch((4, 8, 8))
    images[1, :, 2:], images[2, :, :1], images[4] = 0, 0, 0
    check(small("cnn-lstm", 3, "group"), images, weights, PATIENTS)


def test_deepmedic_that_is_given_what_lies_around_a_box() -> None:
    images, weights = batch((55, 56))  # of which 3 x 4 pixels are predicted
    check(steady(deepmedic(norm="group", width=3, dimensions=2, context=True)), images, weights, PATIENTS)


@pytest.mark.parametrize("make", [small_cnn, unet])
def test_late_fusion_with_a_modality_missing_from_one_image(make) -> None:
    network = late_fusion(
        lambda channels: make(in_channels=channels, norm="group", width=2), in_channels=2, modalities=2, outputs=3
    ).double()
    images, weights = batch((16, 16), channels=2)
    images[1, 0] = 0
    check(network, images, weights, PATIENTS)


def test_deep_supervision_returns_several_outputs() -> None:
    network = unet(norm="group", width=2, deep_supervision=True).double().train()
    images, weights = batch((32, 32))
    assert isinstance(network(images), tuple)
    check(network, images, weights, PATIENTS)


@KINDS
def test_frozen_stages_get_no_gradient_and_the_rest_the_same(name: str, dimensions: int) -> None:
    network = small(name, dimensions, "group")
    frozen = freeze_(network, stages(network)[-2].name)
    images, weights = batch(CASES[name, dimensions][1])
    check(network, images, weights, PATIENTS)
    assert all(network.get_parameter(each).grad is None for each in frozen)


def test_a_frozen_trunk_is_left_out_of_the_backward_pass() -> None:
    network = small("chexnet", 2, "group")
    freeze_(network, "block4")
    reached = []
    network.features.register_forward_hook(lambda module, given, output: reached.append(output.requires_grad))
    images, weights = batch((64, 64))
    GradientClipper(network, max_norm=1.0).accumulate_(squares_of, images, images, PATIENTS, weights)
    assert reached == [False]
