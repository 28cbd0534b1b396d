"""Late fusion: a missing modality changes nothing, and the statistics are those of the modalities present."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmed.config import ModelConfig
from fedmed.errors import ModelError
from fedmed.models import MODELS, build, stages
from fedmed.models.fusion import LateFusion, fused, late_fusion
from fedmed.models.small_cnn import small_cnn

SIDES = {"cnn-lstm": (2, 8, 8), "deepmedic": (3, 3, 3), "chexnet": (32, 32), "vgg16": (32, 32)}


def fusion(name: str, modalities: int = 2, in_channels: int = 2) -> LateFusion:
    def make(channels: int) -> nn.Module:
        return MODELS[name](in_channels=channels, outputs=2, norm="group", width=2)

    return late_fusion(make, in_channels=in_channels, modalities=modalities, outputs=2).eval()


def images_for(name: str, channels: int = 2) -> Tensor:
    return torch.randn(2, channels, *SIDES.get(name, (16, 16)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_every_network_can_be_the_encoder(name: str) -> None:
    network, images = fusion(name), images_for(name)
    dense = name in ("unet", "attention-unet", "deepmedic")
    assert network(images).shape == ((2, 2, *images.shape[2:]) if dense else (2, 2))
    names = [parameter for stage in stages(network) for parameter in stage.parameters]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    assert stages(network)[-1].parameters == ("head.weight", "head.bias")


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_modality_is_left_out(name: str) -> None:
    network, images = fusion(name), images_for(name)
    images[:, 1] = 0
    features = network.encoders[0](images[:, :1])
    torch.testing.assert_close(network(images), network.head(torch.cat((features, torch.zeros_like(features)), dim=1)))
    for parameter in network.encoders[1].parameters():
        parameter.data.add_(1.0)  # an encoder without an image is not asked
    again = network(images)
    torch.testing.assert_close(again, network.head(torch.cat((features, torch.zeros_like(features)), dim=1)))


def test_modalities_present_in_one_image_and_missing_in_another_share_a_batch() -> None:
    network, images = fusion("small-cnn", modalities=3, in_channels=3), images_for("small-cnn", 3)
    images[0, 1] = 0
    together = network(images)
    torch.testing.assert_close(together[:1], network(images[:1]))
    torch.testing.assert_close(together[1:], network(images[1:]))


def test_nothing_at_all_gives_the_heads_bias() -> None:
    network = fusion("small-cnn")
    torch.nn.init.constant_(network.head.bias, 3.0)
    assert network(torch.zeros(1, 2, 16, 16)).tolist() == [[3.0, 3.0]]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_statistics_equal_numpys_over_the_modalities_present(present: list[bool], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(4, 1, 3, 2))
    there = values[present]
    zero = np.zeros((1, 3, 2))
    mean = there.mean(axis=0) if len(there) else zero
    variance = there.var(axis=0, ddof=1) if len(there) > 1 else zero
    found = fused(torch.from_numpy(values), torch.tensor(present)[:, None])
    np.testing.assert_allclose(found.numpy(), np.concatenate((mean, variance), axis=1), atol=1e-12)


def test_the_order_of_modalities_does_not_matter_to_the_statistics() -> None:
    features, present = torch.randn(3, 2, 4), torch.tensor([[True, True], [True, False], [False, True]])
    order = [2, 0, 1]
    torch.testing.assert_close(fused(features, present), fused(features[order], present[order]))


def test_a_modality_may_have_several_channels() -> None:
    network = fusion("small-cnn", modalities=2, in_channels=6)
    assert network.encoders[0].get_parameter("block1.0.weight").shape[1] == 3
    assert network(torch.randn(1, 6, 16, 16)).shape == (1, 2)
    with pytest.raises(ModelError, match="needs 6 channels, got 5"):
        network(torch.randn(1, 5, 16, 16))


@pytest.mark.parametrize(("in_channels", "modalities"), [(3, 2), (2, 1), (2, 0), (1, 2)])
def test_refuses_channels_that_cannot_be_shared_out(in_channels: int, modalities: int) -> None:
    with pytest.raises(ModelError, match=r"model\.modalities"):
        fusion("small-cnn", modalities, in_channels)


@pytest.mark.parametrize("name", ["small-cnn", "unet"])
def test_refuses_batch_norm_that_would_see_missing_modalities_unless_it_is_frozen(name: str) -> None:
    late = ModelConfig(name=name, width=4, norm="batch", fusion="late", modalities=2, in_channels=2)
    for model in (late, late.model_copy(update={"freeze": "block2" if name == "small-cnn" else "bottom"})):
        with pytest.raises(ModelError, match=r"set model\.norm"):
            build(model, outputs=1, seed=1)
    network = build(late.model_copy(update={"low_rank": 1}), outputs=1, seed=1).train()
    images = images_for(name)
    alone = network(images[:1])
    images[1, 1] = 0
    torch.testing.assert_close(network(images)[:1], alone)
    build(late.model_copy(update={"norm": "group"}), outputs=1, seed=1)


def test_refuses_a_network_that_ends_in_several_layers() -> None:
    def make(channels: int) -> nn.Module:
        return nn.Sequential(small_cnn(in_channels=channels, width=2))

    with pytest.raises(ModelError, match="last stage"):
        late_fusion(make, in_channels=2, modalities=2, outputs=1)
