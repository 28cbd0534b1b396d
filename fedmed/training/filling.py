"""Physical batches of no fewer rows than a public number: no patient's gradient depends on how many others came.

Libraries choose their kernels by the number of rows, and kernels round differently. Weights that a malicious server
sends magnify rounding until it moves everybody's clipped gradient. With PyTorch 2.13 on a CPU a batch of 15 and one of
16 images differ so; from 16 rows on, every row comes out the same, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 16


def filled(batch: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """Images, targets and weights (n, …) with zeros up to so many rows."""
    missing = max(rows - len(batch[0]), 0)
    return tuple(torch.cat([each, each.new_zeros(missing, *each.shape[1:])]) for each in batch)


def numbered(units: Tensor, rows: int) -> Tensor:
    """The unit of every row (n,), n > 0, those that filled up being units of their own."""
    missing = max(rows - len(units), 0)
    return torch.cat([units, units[-1] + 1 + torch.arange(missing)])
