"""Which images come up in a round, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedmed.config import RunConfig, TaskConfig, TrainConfig
from fedmed.imaging.dataset import Dataset

SCANNED = 64  # items in memory while masks are searched for foreground
HEAVIEST = 100.0  # no positive weighs more than so many negatives, however rare it is
Rows = NDArray[np.int64]
NOBODY_TO_TRAIN_ON = (
    "no image is left to train on; the site holds everybody out, or no image can be read: see fedmed data check"
)


def batches(
    rows: Rows,
    config: TrainConfig,
    generator: np.random.Generator,
    weights: NDArray[np.float64] | None = None,
    *,
    alone: bool = True,
) -> Iterator[Rows]:
    """Batches of row numbers: `local-steps` optimizer steps, or `local-epochs` passes with the last batch kept.

    Args:
        rows: (n,) to draw from.
        config: batch size and number of steps or epochs.
        generator: of the order.
        weights: (n,) chances, drawn with replacement; None = every row once in every pass, in random order.
        alone: whether the last row of a pass may be a batch by itself; else it joins the batch before it.
    """
    starts = list(range(0, len(rows), config.batch_size))
    if not alone and config.batch_size > 1 and len(rows) % config.batch_size == 1 < len(rows):
        starts.pop()
    left = config.local_steps * config.accumulate or -1
    for _ in range(config.local_epochs if left < 0 else 10**9):
        if weights is None:
            chosen = generator.permutation(rows)
        else:
            chosen = generator.choice(rows, size=len(rows), p=weights / weights.sum())
        for start, end in pairwise([*starts, len(rows)]):
            if left == 0:
                return
            left -= 1
            yield chosen[start:end]


def steps_allowed(config: RunConfig, examples: int) -> range:
    """How many optimizer steps a round can have over so many examples, as the loops of training count them.

    Args:
        config: the run.
        examples: training images of the site; under DP-SGD its training patients.

    Returns:
        From the fewest to the most: the last image of a pass may be a batch or not, and a site that may stop early can
        have as few as one.
    """
    train, privacy = config.train, config.privacy
    if train.local_steps:
        fewest = most = train.local_steps
    elif privacy.mode == "dp-sgd":
        units = examples * (privacy.images_per_patient if privacy.unit == "image" else 1)
        fewest = most = train.local_epochs * -(-units // min(train.batch_size * train.accumulate, units))
    else:
        batches = -(-examples // train.batch_size)
        joined = train.batch_size > 1 and examples % train.batch_size == 1 < examples
        fewest, most = (-(-train.local_epochs * each // train.accumulate) for each in (batches - joined, batches))
    return range(1 if train.patience else fewest, most + 1)


def balanced_weights(data: Dataset, rows: Rows, task: TaskConfig) -> NDArray[np.float64]:
    """Chances that let every label come up as often as the images without any.

    An image weighs 1 / (images with its rarest label), or 1 / (images without a label). In segmentation an item has a
    label where its mask has.

    Returns:
        (n,) positive.
    """
    positive = _positive(data, rows, task)  # (n, labels)
    with_label = np.maximum(positive.sum(axis=0), 1)
    rarest = np.where(positive, 1 / with_label, 0).max(axis=1, initial=0)
    without = ~positive.any(axis=1)
    return np.where(without, 1 / max(int(without.sum()), 1), rarest)


def balanced_positive_weights(data: Dataset, rows: Rows) -> NDArray[np.float32]:
    """For each label known negatives / known positives, in [1 / 100, 100]; 1 where one of the two is absent.

    In segmentation the counts are of pixels.

    Returns:
        (labels,).
    """
    if data.labelled is not None:
        counts = [_counts(data.labelled[rows])]
    else:
        starts = range(0, len(rows), SCANNED)
        counts = [_counts(data.batch(rows[start : start + SCANNED])[1].numpy()) for start in starts]
    negatives, positives = np.sum(counts, axis=0)
    ratio = negatives / np.maximum(positives, 1)
    defined = (positives > 0) & (negatives > 0)
    return np.where(defined, np.clip(ratio, 1 / HEAVIEST, HEAVIEST), 1).astype(np.float32)


def _counts(targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """(2, labels): known negatives and positives."""
    others = tuple(axis for axis in range(targets.ndim) if axis != 1)
    return np.array([(targets == 0).sum(axis=others), (targets == 1).sum(axis=others)], np.float64)


def _positive(data: Dataset, rows: Rows, task: TaskConfig) -> NDArray[np.bool_]:
    """(n, labels): whether an item has a label."""
    if task.kind == "classification" and data.labelled is not None:
        known: NDArray[np.bool_] = data.labelled[rows] == 1
        return known
    parts = []
    for start in range(0, len(rows), SCANNED):
        targets = data.batch(rows[start : start + SCANNED])[1]
        parts.append((targets == 1).flatten(2).any(2).numpy())
    return np.concatenate(parts)
