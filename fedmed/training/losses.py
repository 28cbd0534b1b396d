"""Losses, each the mean of per-image terms, so that no image's gradient depends on another image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmed.config import TaskConfig

Loss = Callable[[Tensor, Tensor], Tensor]


def masked_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy averaged over the known labels of the batch.

    Args:
        logits: (N, labels).
        targets: (N, labels) of 0, 1, or NaN where the label is unknown.

    Returns:
        A scalar; 0 with a zero gradient when no label of the batch is known.
    """
    unknown = torch.isnan(targets)
    if not targets.is_cuda and not unknown.any():  # on a GPU, asking would wait for it
        return F.binary_cross_entropy_with_logits(logits, targets)
    losses = F.binary_cross_entropy_with_logits(logits, torch.nan_to_num(targets), reduction="none")
    return losses.masked_fill(unknown, 0).sum() / (~unknown).sum().clamp(min=1)


def dice_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft Dice loss plus binary cross-entropy, per image and label, then averaged over the batch.

    1 - (2·Σ p·t + 1) / (Σ p + Σ t + 1)  (Milletari et al. 2016, arXiv:1606.04797, with the linear denominator and a
    smoothing of 1), computed for every image alone: Dice over the whole batch would couple patients.

    Args:
        logits: (N, labels, H, W).
        targets: (N, labels, H, W) of 0 and 1.
    """
    pixels = (2, 3)
    probabilities = torch.sigmoid(logits)
    overlap = (probabilities * targets).sum(pixels)  # (N, labels)
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(pixels) + targets.sum(pixels) + 1)
    return dice.mean() + F.binary_cross_entropy_with_logits(logits, targets)


LOSSES: dict[str, Loss] = {"classification": masked_bce, "segmentation": dice_bce}


def loss_for(task: TaskConfig) -> Loss:
    """The training loss of a task."""
    return LOSSES[task.kind]
