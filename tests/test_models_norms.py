"""Normalization layers by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmed.errors import ModelError
from fedmed.models.norms import group_count, norm_layer


@given(st.integers(1, 5000))
def test_groups_divide_the_channels_and_hold_two_or_more(channels: int) -> None:
    groups = group_count(channels)
    assert 1 <= groups <= 32
    assert channels % groups == 0
    assert channels // groups >= 2 or channels == 1
    assert not [more for more in range(groups + 1, 33) if channels % more == 0 and channels // more >= 2]


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (2, 1), (7, 1), (16, 8), (64, 32), (96, 32), (1024, 32)])
def test_group_counts_by_hand(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


@pytest.mark.parametrize(
    ("kind", "dimensions", "layer"),
    [
        ("batch", 2, nn.BatchNorm2d),
        ("batch", 3, nn.BatchNorm3d),
        ("group", 2, nn.GroupNorm),
        ("group", 3, nn.GroupNorm),
        ("instance", 2, nn.InstanceNorm2d),
        ("instance", 3, nn.InstanceNorm3d),
    ],
)
def test_every_kind_has_a_scale_and_a_shift(kind: str, dimensions: int, layer: type[nn.Module]) -> None:
    norm = norm_layer(kind, 12, dimensions)
    assert isinstance(norm, layer)
    assert {name: p.shape for name, p in norm.named_parameters()} == {"weight": (12,), "bias": (12,)}
    sides = [4] * dimensions
    assert norm(torch.randn(2, 12, *sides)).shape == (2, 12, *sides)


def test_none_changes_nothing() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(norm_layer("none", 3)(images), images)


def test_refuses_an_unknown_kind_or_dimension() -> None:
    with pytest.raises(ModelError, match="expected batch, group or instance"):
        norm_layer("layer", 4)
    with pytest.raises(ModelError, match="2 or 3 dimensions"):
        norm_layer("batch", 4, dimensions=1)
