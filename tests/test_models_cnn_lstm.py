"""The slice-sequence classifier: its LSTM is torch's, its CNN is a 2D network on every slice, order counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fedmed.errors import ModelError
from fedmed.models.cnn_lstm import LSTM, cnn_lstm
from fedmed.models.small_cnn import small_cnn


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def test_parameter_count_by_hand() -> None:
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 64 + 64 * 128)
    norms = 2 * (16 + 32 + 64 + 128)
    lstm = 4 * 128 * (128 + 128) + 4 * 128  # four gates of 128 units: W, U, b
    classifier = 2 * 128 * 2 + 2
    with torch.device("meta"):
        network = cnn_lstm()
    assert sum(p.numel() for p in network.parameters()) == convolutions + norms + 2 * lstm + classifier == 361_074


@pytest.mark.parametrize("steps", [2, 7])
def test_lstm_equals_torchs(steps: int) -> None:
    ours, theirs = LSTM(5, 6).double(), nn.LSTM(5, 6, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.of_input.weight)
        theirs.weight_hh_l0.copy_(ours.of_memory.weight)
        theirs.bias_ih_l0.copy_(ours.of_input.bias)
        theirs.bias_hh_l0.zero_()
    sequence, count = torch.randn(3, steps, 5, dtype=torch.float64), torch.tensor([1, 2, steps])
    for row, found in enumerate(ours(sequence, count)):
        torch.testing.assert_close(found, theirs(sequence[row, : count[row]])[1][0][0])


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
@pytest.mark.parametrize(("slices", "depth", "start"), [(10, 40, 15), (10, 20, 3), (5, 15, 10), (1, 7, 2)])
def test_zeros_around_a_series_change_nothing(norm: str, slices: int, depth: int, start: int) -> None:
    network = cnn_lstm(norm=norm, width=4).eval()
    series, padded = 1 + torch.randn(2, 1, slices, 16, 16), torch.zeros(2, 1, depth, 16, 16)
    padded[:, :, start : start + slices] = series
    alone = network(series if slices > 1 else torch.cat((series, 0 * series), dim=2))
    torch.testing.assert_close(network(padded), alone, rtol=1e-4, atol=1e-5)
    mixed = padded.clone()
    mixed[1] = torch.randn(1, depth, 16, 16)
    torch.testing.assert_close(network(mixed)[:1], alone[:1], rtol=1e-4, atol=1e-5)
    assert network(torch.zeros_like(padded)).isfinite().all()


def test_a_series_that_fills_no_whole_number_of_times_is_nearly_the_same() -> None:
    network = cnn_lstm(norm="group").eval()
    series, padded = torch.rand(4, 1, 10, 16, 16), torch.zeros(4, 1, 24, 16, 16)
    padded[:, :, 7:17] = series
    alone, found = network(series), network(padded)
    assert (found - alone).abs().max() < 0.02 * alone.abs().max()


def test_features_are_those_of_a_2d_network_on_every_slice() -> None:
    series = cnn_lstm(norm="batch", width=2)
    slices = small_cnn(norm="batch", width=2)
    state = {name: tensor for name, tensor in series.state_dict().items() if name.startswith("block")}
    flat = {name: tensor.squeeze(2) if tensor.dim() == 5 else tensor for name, tensor in state.items()}
    slices.load_state_dict(flat, strict=False)
    images = torch.randn(2, 1, 5, 16, 16)
    one = series.pool(series.block1(images))[:, :, 3]
    torch.testing.assert_close(
        one, slices.pool(slices.block1(images.transpose(1, 2).flatten(0, 1))).unflatten(0, (2, 5))[:, 3]
    )


def test_the_order_of_slices_counts() -> None:
    network = cnn_lstm(norm="group", width=2)
    series = torch.randn(2, 1, 6, 8, 8)
    assert not torch.allclose(network(series), network(series[:, :, [1, 0, 2, 3, 4, 5]]), atol=1e-5)
    assert network(series[:, :, :2]).shape == (2, 2)


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_smallest_series_runs_and_a_smaller_one_is_refused(norm: str) -> None:
    network = cnn_lstm(in_channels=2, outputs=3, norm=norm, width=2)
    assert network(torch.randn(2, 2, 2, 8, 8)).isfinite().all()
    for sides in [(1, 8, 8), (2, 7, 8)]:
        with pytest.raises(ModelError, match="cnn-lstm needs"):
            network(torch.zeros(2, 2, *sides))


def test_refuses_single_images() -> None:
    with pytest.raises(ModelError, match=r"data\.items"):
        cnn_lstm(dimensions=2)


def test_learns_in_which_direction_a_spot_moves() -> None:
    network = cnn_lstm(outputs=1, norm="group", width=4)
    series = torch.zeros(8, 1, 6, 8, 8)
    targets = torch.tensor([0.0, 1.0]).repeat(4)[:, None]
    for row in range(8):
        for step in range(6):
            series[row, 0, step, 4, :] = (step if row % 2 else 5 - step) / 5
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.binary_cross_entropy_with_logits(network(series), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
