"""The small classifier."""

from __future__ import annotations

import pytest
import torch

from fedmed.errors import ModelError
from fedmed.models.small_cnn import small_cnn


def test_parameter_count_by_hand() -> None:
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 64 + 64 * 128)
    norms = 2 * (16 + 32 + 64 + 128)
    classifier = 128 * 2 + 2
    assert sum(p.numel() for p in small_cnn().parameters()) == convolutions + norms + classifier == 97_650


@pytest.mark.parametrize(("norm", "smallest"), [("batch", 8), ("group", 8), ("instance", 16), ("none", 8)])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_smallest_image_runs_and_a_smaller_one_is_refused(norm: str, smallest: int, dimensions: int) -> None:
    network = small_cnn(in_channels=3, outputs=5, norm=norm, width=4, dimensions=dimensions)
    sides = [smallest] * dimensions
    assert network(torch.randn(2, 3, *sides)).shape == (2, 5)
    with pytest.raises(ModelError, match="small-cnn needs images"):
        network(torch.zeros(2, 3, *sides[1:], smallest - 1))


def test_learns_to_tell_bright_from_dark() -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = small_cnn(outputs=1, norm="group", width=4)
    targets = torch.tensor([0.0, 1.0]).repeat(8)[:, None]  # (16, 1)
    images = torch.randn(16, 1, 16, 16, generator=generator)
    images[:, :, 4:12, 4:12] += 2 * targets[:, :, None, None]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
