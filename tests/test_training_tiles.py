"""Volumes that are cut into tiles are put together again as if they had been predicted whole."""

import numpy as np
import pytest
import torch
from torch import nn

from fedmed import config as run_file
from fedmed.config import ModelConfig
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.stored import Slots, Tiles
from fedmed.models import build
from fedmed.training.evaluate import (
    checked_sums,
    evaluation_sums,
    likeliest_alone,
    mean_loss,
    metrics_from,
    predictions,
)
from fedmed.training.loop import training_batch
from fedmed.training.network import FlatNetwork
from fedmed.training.sampling import balanced_weights
from fedmed.training.tiles import parts, tile_window, within

SHAPES = [(7, 9, 10), (3, 4, 12), (4, 6, 6)]  # one smaller than the box, one just it
BOX = (4, 6, 6)


@pytest.fixture
def volumes() -> tuple[list[np.ndarray], list[np.ndarray], Dataset]:
    rng = np.random.default_rng(0)
    images = [rng.random((1, *shape), dtype=np.float32) for shape in SHAPES]
    masks = [(image > 0.7).astype(np.uint8) for image in images]
    tiles = Tiles.over(images, BOX)
    of_volume = tiles.volume
    data = Dataset(
        images=tiles,
        targets=Tiles.over(masks, BOX),
        patients=tuple(f"patient-{number}" for number in of_volume),
        rows=of_volume + 2,
        labels=1,
    )
    return images, masks, data


def pointwise() -> FlatNetwork:
    torch.manual_seed(0)
    return FlatNetwork(nn.Conv3d(1, 1, 1), torch.device("cpu"))


def test_a_pointwise_network_gives_what_it_gives_for_the_whole_volume(volumes):
    images, masks, data = volumes
    network = pointwise()
    found = list(predictions(network, data, np.arange(len(data))))
    assert len(found) == len(SHAPES)
    for (rows, logits, targets), image, mask in zip(found, images, masks, strict=True):
        whole = network(torch.from_numpy(image)[None]).detach().numpy()
        assert data.rows[rows[0]] == 2 + SHAPES.index(image.shape[1:])
        np.testing.assert_allclose(logits, whole, atol=1e-5)
        np.testing.assert_array_equal(targets[0], mask)


def test_sums_count_volumes_and_not_tiles(volumes):
    *_, data = volumes
    task = run_file.validate({"task": {"kind": "segmentation", "labels": ["a"]}}).task
    sums = evaluation_sums(pointwise(), data, np.arange(len(data)), task, spacing_mm=(2.0, 1.0, 1.0))
    assert int(sums["images"][0]) == int(sums["patients"][0]) == len(SHAPES)


def test_some_volumes_alone_can_be_predicted(volumes):
    *_, data = volumes
    rows = np.flatnonzero(data.rows == 3)
    ((first, logits, _),) = predictions(pointwise(), data, rows)
    assert first[0] == rows[0]
    assert logits.shape == (1, 1, *SHAPES[1])


def test_weights_of_a_tile_are_highest_in_its_middle_and_nowhere_zero():
    window = tile_window((5, 4, 7))
    assert window.shape == (5, 4, 7)
    assert float(window.min()) > 0
    assert window[2, 1:3, 3].min() == window.max()
    torch.testing.assert_close(window, window.flip(0).flip(1).flip(2))


def test_tiles_with_foreground_come_up_as_often_as_those_without(volumes):
    *_, data = volumes
    masks = Tiles.over([np.zeros((1, *shape), np.uint8) for shape in SHAPES], BOX)
    masks.volumes[0][0, 0, 0, 0] = 1  # in one tile alone
    some = Dataset(images=data.images, targets=masks, patients=data.patients, rows=data.rows, labels=1)
    task = run_file.validate({"task": {"kind": "segmentation", "labels": ["a"]}}).task
    weights = balanced_weights(some, np.arange(len(some)), task)
    assert weights[0] == pytest.approx(weights[1:].sum())


def lonely_voxels() -> Dataset:
    """Two volumes, each with a single voxel of foreground, at the edge of a box or in its middle."""
    masks = [np.zeros((1, 12, 12, 12), np.uint8) for _ in range(2)]
    masks[0][0, 0, 0, 0] = masks[1][0, 6, 6, 6] = 1
    images = [mask / np.float32(2) for mask in masks]
    tiles = Tiles.over(images, BOX)
    patients = tuple(map(str, tiles.volume))
    return Dataset(tiles, Tiles.over(masks, BOX), patients, rows=tiles.volume, labels=1)


@pytest.mark.parametrize("margin", [0, 2])
def test_balanced_patches_keep_their_foreground_where_augmentation_moves_them(margin):
    data = lonely_voxels()
    rows = np.arange(len(data))
    held = data.batch(rows)[1].flatten(1).any(1)
    images, masks, stayed = {}, {}, {}
    for sampling in ("shuffle", "balanced"):
        train = run_file.validate({"train": {"augment": ["flip"], "sampling": sampling}}).train
        drawn = [training_batch(data, rows, train, (7, step), margin) for step in range(30)]
        images[sampling], masks[sampling] = (torch.stack(each) for each in zip(*drawn, strict=True))
        stayed[sampling] = masks[sampling].flatten(2).any(2)
        torch.testing.assert_close(within(images[sampling][0], margin) * 2, masks[sampling][0])  # they move together
    assert stayed["balanced"][:, held].all()
    assert not stayed["shuffle"][:, held].all()
    same = stayed["shuffle"] | ~held  # no other box is cut elsewhere than without
    assert torch.equal(images["balanced"][same], images["shuffle"][same])


def test_where_a_box_stays_depends_on_no_other_box_and_follows_from_the_seed():
    data = lonely_voxels()
    train = run_file.validate({"train": {"augment": ["flip"], "sampling": "balanced"}}).train
    rows = np.arange(len(data))
    once, again = (training_batch(data, rows, train, (7, 3)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
    corners = data.images.jittered(rows, np.random.default_rng(1))
    alone = [data.targets.keeping_foreground(rows[n : n + 1], corners[n : n + 1]) for n in rows]
    np.testing.assert_array_equal(data.targets.keeping_foreground(rows, corners), np.concatenate(alone))


@pytest.mark.parametrize("margin", [0, 1, 5])
def test_boxes_bring_what_lies_around_them_and_zeros_from_beyond_their_volume(volumes, margin):
    images, masks, data = volumes
    pixels, truth = data.batch(np.arange(len(data)), margin=margin)
    for number, corner, box, mask in zip(data.tiles.volume - 2, data.tiles.corner, pixels, truth, strict=True):
        for whole, found in ((images[number], box), (masks[number], mask)):
            padded = np.pad(whole, [(0, 0)] + [(margin, margin + 6)] * 3)
            place = tuple(slice(at, at + side + 2 * margin) for at, side in zip(corner, BOX, strict=True))
            np.testing.assert_array_equal(found, padded[(slice(None), *place)])
    torch.testing.assert_close(within(truth, margin), data.batch(np.arange(len(data)))[1])


@pytest.mark.parametrize("residual", [False, True])
def test_deepmedic_in_tiles_is_deepmedic_over_the_whole_volume(residual):
    image = np.random.default_rng(1).random((1, 12, 9, 18), dtype=np.float32)
    tiles, config = Tiles.over([image], (6, 6, 6)), ModelConfig(name="deepmedic", norm="none", width=3)
    config = config.model_copy(update={"residual": residual})
    data = Dataset(tiles, Tiles.over([image > 0.5], (6, 6, 6)), ("",) * len(tiles), rows=tiles.volume, labels=1)
    in_tiles, whole = (
        FlatNetwork(build(config, outputs=1, seed=1, dimensions=3, context=context), torch.device("cpu"))
        for context in (True, False)
    )
    ((_, logits, targets),) = predictions(in_tiles, data, np.arange(len(data)))
    with torch.inference_mode():
        expected = whole.module.eval()(torch.from_numpy(image)[None])
    torch.testing.assert_close(torch.from_numpy(logits), expected)
    np.testing.assert_array_equal(targets[0], image > 0.5)


@pytest.mark.parametrize("changes", [[], ["flip"]])
def test_training_on_boxes_shows_deepmedic_what_lies_around_them(volumes, changes):
    *_, data = volumes
    config = ModelConfig(name="deepmedic", norm="group", width=3)
    network = FlatNetwork(build(config, outputs=1, seed=1, dimensions=3, context=True), torch.device("cpu"))
    train = run_file.validate({"train": {"augment": changes}}).train
    images, masks = training_batch(data, np.arange(6), train, (1,), network.margin_voxels)
    assert images.shape[2:] == tuple(side + 2 * network.margin_voxels for side in BOX)
    assert network(images).shape == masks.shape == (6, 1, *BOX)
    torch.testing.assert_close(within(images, network.margin_voxels).gt(0.7).float(), masks)
    assert (images > 0).sum() > 2 * (within(images, network.margin_voxels) > 0).sum()


@pytest.mark.parametrize(
    ("sides", "most"), [((8, 8), 32), ((256, 256), 32), ((512, 512), 8), ((64, 64, 64), 8), ((128, 128, 128), 1)]
)
def test_fewer_large_items_are_evaluated_at_once(sides, most):
    seen = []

    class Flat(nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return images.flatten(2).mean(dim=2)

    data = Dataset(np.zeros((most + 1, 1, *sides), np.uint8), np.zeros((most + 1, 1), np.float32), ("",) * (most + 1))
    network, rows = FlatNetwork(Flat(), torch.device("cpu")), np.arange(most + 1)
    assert sum(len(chosen) for chosen, _, _ in predictions(network, data, rows)) == most + 1
    mean_loss(network, data, rows, nn.functional.mse_loss)
    assert seen == [most, 1] * 2


def test_large_tiles_are_predicted_one_by_one():
    tiles = Tiles.over([np.zeros((1, 130, 128, 128), np.uint8)], (128, 128, 128))
    data = Dataset(tiles, tiles, ("",) * len(tiles), rows=tiles.volume, labels=1)
    assert [len(chosen) for chosen in parts(pointwise(), data, np.arange(2), most=4)] == [1, 1]


@pytest.mark.parametrize("shape", [(5, 2, 4, 4), (3, 3, 2, 4, 4)])
def test_of_exclusive_labels_only_the_likeliest_stays_above_zero(shape):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    above = likeliest_alone(logits) > 0
    with_background = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
    assert torch.equal(torch.where(above.any(1), above.int().argmax(1) + 1, 0), with_background.argmax(1))
    assert int(above.sum(1).max()) == 1
    assert torch.equal(likeliest_alone(logits[:, :1]), logits[:, :1])


@pytest.mark.parametrize("value", [-3.0, 0.0, 0.1, 1.0, 5.0, 37.7, 1e4])
@pytest.mark.parametrize("labels", [2, 3, 7])
def test_equally_likely_labels_have_no_place(value, labels):
    assert not (likeliest_alone(torch.full((1, labels, 2, 2), value)) > 0).any()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_logits_of_exclusive_labels_are_the_log_odds_of_their_softmax(scale):
    logits = scale * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    wide = torch.cat([torch.zeros(4, 1, 8, 8), logits], 1).double()
    expected = torch.stack(
        [wide[:, k] - wide[:, [j for j in range(4) if j != k]].logsumexp(1) for k in (1, 2, 3)], dim=1
    )
    best = wide.argmax(1, keepdim=True) == torch.tensor([1, 2, 3]).view(-1, 1, 1)
    expected = torch.where(best, expected.clamp(min=0), expected)  # the likeliest has the place
    found = likeliest_alone(logits)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 + 1e-7 * scale)


@pytest.mark.parametrize("numbers", [True, False])
def test_labels_exclude_each_other_where_masks_are_class_numbers_and_may_overlap_elsewhere(numbers):
    class Both(nn.Module):
        """Two labels, both likelier than none everywhere, the second the likelier one."""

        def forward(self, images):
            return torch.cat([images + 1, images + 2], 1)

    masks = Slots.of(np.full((2, 1, 4, 4), 2, np.uint8)) if numbers else np.ones((2, 2, 4, 4), np.float32)
    data = Dataset(np.zeros((2, 1, 4, 4), np.float32), masks, ("p", "q"), labels=2 if numbers else 0)
    task = run_file.validate({"task": {"kind": "segmentation", "labels": ["a", "b"]}}).task
    sums = evaluation_sums(FlatNetwork(Both(), torch.device("cpu")), data, np.arange(2), task)
    assert (sums["intersection"] / 32).tolist() == ([0, 1] if numbers else [1, 1])
    assert (sums["total"] / 32).tolist() == ([0, 2] if numbers else [2, 2])
    one, two = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)[1:] if numbers else torch.tensor([1.0, 2.0]).sigmoid()
    expected = -(torch.log(1 - one if numbers else one) + torch.log(two)) / 2
    assert sums["loss"] / 2 == pytest.approx(expected.item())


def test_a_site_sends_nothing_of_a_label_that_few_held_out_patients_have():
    masks = np.ones((3, 2, 4, 4), np.float32)
    masks[1:, 1] = 0
    data = Dataset(np.ones((3, 1, 4, 4), np.float32), masks, ("p", "q", "r"))
    task = run_file.validate({"task": {"kind": "segmentation", "labels": ["a", "rare"]}}).task
    network = FlatNetwork(nn.Conv2d(1, 2, 1).requires_grad_(False), torch.device("cpu"))
    sums = checked_sums(evaluation_sums(network, data, np.arange(3), task, fewest=2), task)
    assert sums["cases"].tolist() == [3, 0] and sums["lesions"].tolist() == [3, 0]
    assert metrics_from(sums, task)["dice/rare"] is None
    assert evaluation_sums(network, data, np.arange(3), task, fewest=1)["lesions"].tolist() == [3, 1]
