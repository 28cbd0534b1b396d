"""Every loss against its formula, written out by hand; and that known masks couple no images of a batch."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmed import config as run_file
from fedmed.errors import ConfigError
from fedmed.imaging.dataset import Dataset
from fedmed.training import evaluate, tiles
from fedmed.training.losses import (
    deeply_supervised,
    dice,
    dice_bce,
    dice_ce,
    loss_for,
    masked_bce,
    masked_focal,
    smoothed,
    tversky,
)
from fedmed.training.network import FlatNetwork

LOGITS = torch.tensor([[0.3, -1.2], [2.0, 0.1], [-0.7, 0.9]], dtype=torch.float64)
TARGETS = torch.tensor([[1.0, 0.0], [0.0, float("nan")], [1.0, 1.0]], dtype=torch.float64)
KNOWN = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]


def probability_of_truth(row: int, label: int) -> float:
    p = 1 / (1 + np.exp(-float(LOGITS[row, label])))
    return p if TARGETS[row, label] == 1 else 1 - p


def masks(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(shape, generator=generator) < 0.3).double()


def test_masked_bce_is_the_mean_over_known_labels():
    by_hand = np.mean([-np.log(probability_of_truth(*place)) for place in KNOWN])
    assert float(masked_bce(LOGITS, TARGETS)) == pytest.approx(by_hand)


def test_focal_loss_by_hand():
    by_hand = np.mean([-((1 - probability_of_truth(*at)) ** 2) * np.log(probability_of_truth(*at)) for at in KNOWN])
    assert float(masked_focal(LOGITS, TARGETS, gamma=2.0)) == pytest.approx(by_hand)


def test_focal_loss_without_focus_is_cross_entropy():
    assert float(masked_focal(LOGITS, TARGETS, gamma=0.0)) == pytest.approx(float(masked_bce(LOGITS, TARGETS)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("dtype", "sure"), [(torch.float32, 18.0), (torch.float32, 120.0), (torch.bfloat16, 7.0)])
def test_focal_loss_of_what_is_surely_right_has_a_finite_gradient(gamma, dtype, sure):
    logits = torch.tensor([[sure, -sure]], dtype=dtype, requires_grad=True)
    masked_focal(logits, torch.tensor([[1.0, 0.0]]), gamma=gamma).backward()
    assert torch.isfinite(logits.grad).all() and float(logits.grad.abs().max()) < 0.01


def test_positive_weights_weigh_positives():
    weights = torch.tensor([3.0, 5.0], dtype=torch.float64)
    values = [-np.log(probability_of_truth(*at)) * (float(weights[at[1]]) if TARGETS[at] == 1 else 1.0) for at in KNOWN]
    assert float(masked_bce(LOGITS, TARGETS, positive_weights=weights)) == pytest.approx(np.mean(values))


def test_an_unknown_batch_has_no_loss_and_no_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    for loss in (masked_bce, lambda a, b: masked_focal(a, b, gamma=2.0)):
        value = loss(logits, torch.full((2, 3), float("nan")))
        value.backward()
        assert float(value.detach()) == 0
        assert not logits.grad.any()


@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (2, 2, 3, 4, 5)], ids=["2D", "3D"])
def test_dice_by_hand(shape):
    logits, targets = masks(*shape)
    values = []
    for image in range(2):
        for label in range(2):
            p, t = torch.sigmoid(logits[image, label]), targets[image, label]
            values.append(1 - float((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)))
    assert float(dice(logits, targets)) == pytest.approx(np.mean(values))
    both = np.mean(values) + float(F.binary_cross_entropy_with_logits(logits, targets))
    assert float(dice_bce(logits, targets)) == pytest.approx(both)


def test_tversky_punishes_misses_more_when_alpha_is_small():
    targets = torch.zeros(1, 1, 4, 4)
    targets[..., :2] = 1
    misses, inventions = targets.clone(), targets.clone()
    misses[..., 1], inventions[..., 2] = 0, 1
    sure = [20 * (2 * mask - 1) for mask in (misses, inventions)]
    missed, invented = (float(tversky(logits, targets, alpha=0.3)) for logits in sure)
    assert missed == pytest.approx(1 - 4.5 / (4 + 0.7 * 4 + 0.5), abs=1e-6)
    assert invented == pytest.approx(1 - 8.5 / (8 + 0.3 * 4 + 0.5), abs=1e-6)


def soft_dice(shares, targets):
    overlap, total = (shares * targets).sum((2, 3)), (shares + targets).sum((2, 3))
    return float((1 - (2 * overlap + 1) / (total + 1)).mean())


def test_exclusive_cross_entropy_has_a_background():
    logits, targets = masks(2, 2, 3, 3)
    targets[:, 1] *= 1 - targets[:, 0]
    exp = torch.exp(torch.cat([torch.zeros(2, 1, 3, 3), logits], 1))
    shares = exp / exp.sum(1, keepdim=True)
    truth = torch.cat([1 - targets.sum(1, keepdim=True), targets], 1)
    by_hand = soft_dice(shares[:, 1:], targets) - float((truth * shares.log()).sum(1).mean())
    assert float(dice_ce(logits, targets)) == pytest.approx(by_hand)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.7])  # from 2 / 3 on, smoothed targets made all of it label 1
def test_label_smoothing_of_exclusive_labels_is_towards_equal_shares(smoothing):
    keys = {"loss": "dice-ce", "label-smoothing": smoothing}
    config = run_file.validate({"task": {"kind": "segmentation", "labels": ["a", "b"]}, "train": keys})
    logits, targets = masks(2, 2, 3, 3)
    targets[:, 1] *= 1 - targets[:, 0]
    truth = torch.cat([1 - targets.sum(1, keepdim=True), targets], 1) * (1 - smoothing) + smoothing / 3
    logs = torch.cat([torch.zeros(2, 1, 3, 3), logits], 1).log_softmax(1)
    by_hand = soft_dice(logs.exp()[:, 1:], targets) - float((truth * logs).sum(1).mean())
    assert float(loss_for(config.task, config.train)(logits, targets)) == pytest.approx(by_hand)


def test_several_classes_of_masks_exclude_each_other_by_default():
    config = run_file.validate({"task": {"kind": "segmentation", "labels": ["a", "b"]}})
    logits, targets = masks(2, 2, 3, 3)
    targets[:, 1] *= 1 - targets[:, 0]
    weights = torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    chosen = loss_for(config.task, config.train, exclusive=True)
    weighed = loss_for(config.task, config.train, weights)
    assert float(chosen(logits, targets)) == float(dice_ce(logits, targets))
    assert float(weighed(logits, targets)) == float(dice_bce(logits, targets, positive_weights=weights))
    assert float(loss_for(config.task, config.train)(logits, targets)) == float(dice_bce(logits, targets))


@pytest.mark.parametrize("loss", ["dice-ce", "tversky"])
def test_class_weights_are_refused_where_a_loss_has_none(loss):
    keys = {"loss": loss, "class-weights": "balanced"}
    with pytest.raises(ConfigError, match=rf"class-weights.*{loss}"):
        run_file.validate({"task": {"kind": "segmentation", "labels": ["a"]}, "train": keys})


def test_label_smoothing_moves_targets_towards_one_half():
    moved = smoothed(masked_bce, 0.2)(LOGITS, TARGETS)
    assert float(moved) == pytest.approx(float(masked_bce(LOGITS, TARGETS * 0.8 + 0.1)))


def test_deep_supervision_weighs_coarser_outputs_by_halves():
    logits, targets = masks(2, 1, 4, 4)
    coarse = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    shares = targets.view(2, 1, 2, 2, 2, 2).mean((3, 5))
    by_hand = (float(dice_bce(logits, targets)) + 0.5 * float(dice_bce(coarse, shares))) / 1.5
    assert float(deeply_supervised(dice_bce)((logits, coarse), targets)) == pytest.approx(by_hand)
    assert float(deeply_supervised(dice_bce)(logits, targets)) == float(dice_bce(logits, targets))


@pytest.mark.parametrize("name", ["bce", "focal", "dice-bce", "dice-ce", "tversky"])
def test_no_loss_couples_the_images_of_a_batch(name):
    task = {"kind": "segmentation", "labels": ["a", "b"]}
    config = run_file.validate({"task": task, "train": {"loss": name}})
    loss = loss_for(config.task, config.train)
    logits, targets = masks(3, 2, 4, 4)
    logits.requires_grad_(True)
    (together,) = torch.autograd.grad(loss(logits, targets), logits)
    for image in range(3):
        one = slice(image, image + 1)
        (alone,) = torch.autograd.grad(loss(logits[one], targets[one]), logits)
        torch.testing.assert_close(together[one], alone[one] / 3)


def test_a_loss_of_the_other_task_is_refused():
    with pytest.raises(ConfigError, match="no loss for"):
        run_file.validate({"task": {"labels": ["a"]}, "train": {"loss": "tversky"}})


@pytest.mark.parametrize("batch", [1, 2, 3, 32])
def test_the_held_out_loss_is_the_mean_over_known_labels_whatever_the_batches(batch, monkeypatch):
    monkeypatch.setattr(tiles, "VOXELS_AT_ONCE", batch)  # of one pixel each
    data = Dataset(
        images=np.zeros((3, 1, 1, 1), np.float32), targets=TARGETS.float().numpy(), patients=("a", "b", "c"),
        evaluation=np.ones(3, bool),
    )  # fmt: skip
    network = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(1, 2)), torch.device("cpu"))
    biases = network.module[1].bias.detach().numpy()
    by_hand = [np.log1p(np.exp(-biases[label] * (2 * float(TARGETS[row, label]) - 1))) for row, label in KNOWN]
    assert evaluate.mean_loss(network, data, np.arange(3), masked_bce) == pytest.approx(np.mean(by_hand), rel=1e-6)
    data = dataclasses.replace(data, targets=np.full((3, 2), np.nan, np.float32))
    assert evaluate.mean_loss(network, data, np.arange(3), masked_bce) == 0
