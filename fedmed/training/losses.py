"""Losses of a batch, from one logit per label.

Cross-entropy and focal loss leave out targets that are NaN, which are unknown, and are means over the known labels of
the whole batch: what an image weighs depends on how many labels of the others are known. Dice and Tversky take known
targets only and are means of terms of single images. Where no image may depend on another, as under DP-SGD, a loss is
asked for one image at a time (`private.one_by_one`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmed.config import TaskConfig, TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]


def masked_bce(logits: Tensor, targets: Tensor, *, positive_weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy averaged over the known labels of the batch.

    Args:
        logits: (N, labels, …).
        targets: the same shape, of values in [0, 1], or NaN where the label is unknown.
        positive_weights: (labels, …) what a positive weighs, a negative weighing 1.

    Returns:
        A scalar; 0 with a zero gradient when no label of the batch is known.
    """
    unknown = torch.isnan(targets)
    if not targets.is_cuda and not unknown.any():  # on a GPU, asking would wait for it
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights)
    losses = F.binary_cross_entropy_with_logits(
        logits, torch.nan_to_num(targets), reduction="none", pos_weight=positive_weights
    )
    return _mean_of_known(losses, unknown)


def masked_focal(logits: Tensor, targets: Tensor, *, gamma: float, positive_weights: Tensor | None = None) -> Tensor:
    """Focal loss: cross-entropy in which images that are already right count less.

    -(1 - p)^γ log p, averaged over the known labels, p being the probability of the truth (Lin et al. 2017,
    arXiv:1708.02002, eq. 4). With γ = 0 it is `masked_bce`.

    Args:
        logits: (N, labels, …).
        targets: the same shape, of values in [0, 1], or NaN where the label is unknown.
        gamma: γ, at least 0.
        positive_weights: (labels, …) what a positive weighs, a negative weighing 1.
    """
    unknown = torch.isnan(targets)
    known = torch.nan_to_num(targets)
    losses = F.binary_cross_entropy_with_logits(logits, known, reduction="none", pos_weight=positive_weights)
    probabilities = torch.sigmoid(logits)
    missed = probabilities * (1 - known) + (1 - probabilities) * known  # 1 - p
    missed = missed.clamp(min=torch.finfo(missed.dtype).tiny)  # the slope of 0^γ is infinite for γ < 1
    return _mean_of_known(missed**gamma * losses, unknown)


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft Dice loss per image and label, averaged over the batch.

    1 - (2·Σ p·t + 1) / (Σ p + Σ t + 1)  (Milletari et al. 2016, arXiv:1606.04797, with the linear denominator and a
    smoothing of 1), computed for every image alone: Dice over the whole batch would couple patients.

    Args:
        logits: (N, labels, [D,] H, W).
        targets: the same shape, of 0 and 1.
    """
    return tversky(logits, targets, alpha=0.5)


def tversky(logits: Tensor, targets: Tensor, *, alpha: float) -> Tensor:
    """1 - (Σ p·t + ½) / (Σ p·t + α·Σ p·(1-t) + (1-α)·Σ (1-p)·t + ½)  (Salehi et al. 2017, arXiv:1706.05721, eq. 1).

    With α = ½ it is the Dice loss; a smaller α forgives false positives and punishes misses.
    """
    return _tversky(torch.sigmoid(logits), targets, alpha)


def dice_bce(logits: Tensor, targets: Tensor, *, positive_weights: Tensor | None = None) -> Tensor:
    """Soft Dice loss plus binary cross-entropy."""
    return dice(logits, targets) + F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights)


def dice_ce(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Soft Dice loss plus cross-entropy of labels that exclude each other, with a background whose logit is 0.

    Both are of the same probabilities, a softmax over the labels and the background.

    Args:
        logits: (N, labels, [D,] H, W).
        targets: the same shape, of 0 and 1, at most one label in a place.
        label_smoothing: share that the cross-entropy moves the truth towards equal shares of all classes.
    """
    all_logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)  # (N, 1 + labels, …), background first
    classes = torch.cat([1 - targets.sum(1, keepdim=True), targets], dim=1).argmax(1)  # (N, [D,] H, W), 0 = background
    exclusive = F.cross_entropy(all_logits, classes, label_smoothing=label_smoothing)
    return _tversky(all_logits.softmax(1)[:, 1:], targets, 0.5) + exclusive


def smoothed(loss: Loss, smoothing: float) -> Loss:
    """The loss of targets that are moved a share of the way to one half (Szegedy et al. 2016, arXiv:1512.00567)."""
    return lambda logits, targets: loss(logits, targets * (1 - smoothing) + smoothing / 2)


def deeply_supervised(loss: Loss) -> Callable[[Tensor | tuple[Tensor, ...], Tensor], Tensor]:
    """The loss of a network that gives coarser outputs besides, each weighing half of the one before.

    Lee et al. 2015 (arXiv:1409.5185), with the weights 1, ½, ¼, … normalised to sum 1 (Isensee et al. 2021, nnU-Net).
    Targets are averaged down to the size of an output, and so become shares.
    """

    def supervised(outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return loss(outputs, targets)
        weights = [0.5**level for level in range(len(outputs))]
        values = [
            weight * loss(output, _downsampled(targets, output))
            for weight, output in zip(weights, outputs, strict=True)
        ]
        return torch.stack(values).sum() / sum(weights)

    return supervised


def loss_for(
    task: TaskConfig, train: TrainConfig, positive_weights: Tensor | None = None, *, exclusive: bool = False
) -> Loss:
    """The training loss of a run.

    Args:
        task: classification or segmentation.
        train: which loss, and its settings.
        positive_weights: (labels,) what a positive of each label weighs; None = 1.
        exclusive: whether `auto` may take a softmax: a place has one label at most, and nothing weighs positives.
    """
    name: str = train.loss
    if name == "auto":
        name = "bce" if task.kind == "classification" else "dice-ce" if exclusive else "dice-bce"
    losses: dict[str, Loss] = {
        "bce": partial(masked_bce, positive_weights=positive_weights),
        "focal": partial(masked_focal, gamma=train.focal_gamma, positive_weights=positive_weights),
        "dice-bce": partial(dice_bce, positive_weights=positive_weights),
        "dice-ce": partial(dice_ce, label_smoothing=train.label_smoothing),  # a class is no share, so not `smoothed`
        "tversky": partial(tversky, alpha=train.tversky_alpha),
    }
    if train.label_smoothing and name != "dice-ce":
        return smoothed(losses[name], train.label_smoothing)
    return losses[name]


def _tversky(probabilities: Tensor, targets: Tensor, alpha: float) -> Tensor:
    pixels = tuple(range(2, targets.ndim))
    overlap = (probabilities * targets).sum(pixels)  # (N, labels)
    invented = probabilities.sum(pixels) - overlap
    missed = targets.sum(pixels) - overlap
    return (1 - (overlap + 0.5) / (overlap + alpha * invented + (1 - alpha) * missed + 0.5)).mean()


def _mean_of_known(losses: Tensor, unknown: Tensor) -> Tensor:
    return losses.masked_fill(unknown, 0).sum() / (~unknown).sum().clamp(min=1)


def _downsampled(targets: Tensor, output: Tensor) -> Tensor:
    if targets.shape == output.shape:
        return targets
    return F.interpolate(targets, output.shape[2:], mode="area")
