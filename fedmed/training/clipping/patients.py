"""Which rows of a batch belong to one patient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Block:
    """Patients in a row that all have the same number of images, so that one batched product serves them."""

    start: int  # the first of their rows
    patients: int
    images: int  # of each patient

    @property
    def rows(self) -> slice:
        """Their rows of the batch."""
        return slice(self.start, self.start + self.patients * self.images)

    def parts(self, patients: int) -> Iterator[Block]:
        """The block in pieces of at most so many patients."""
        for first in range(0, self.patients, patients):
            yield Block(
                start=self.start + first * self.images,
                patients=min(patients, self.patients - first),
                images=self.images,
            )


def counted(blocks: Sequence[Block]) -> int:
    """How many patients some blocks hold."""
    return sum(block.patients for block in blocks)


def each(blocks: Sequence[Block]) -> Iterator[slice]:
    """The rows of every patient of some blocks."""
    for block in blocks:
        for part in block.parts(1):
            yield part.rows


@dataclass(frozen=True, kw_only=True)
class Patients:
    """The rows of a batch in the order of their patients, patients with few images first.

    Patients are numbered anew in that order, 0 … Q-1; those of the caller's 0 … P-1 that have no image are left out.
    """

    total: int  # P
    order: Tensor | None  # (n,) the caller's row at each place; None where the caller's order serves
    names: Tensor  # (Q,) the caller's number of each patient
    of_row: Tensor  # (n,) in 0 … Q-1, ascending
    blocks: tuple[Block, ...]

    @property
    def alone(self) -> bool:
        """Whether every patient has one image: row and patient are then the same."""
        return len(self.of_row) == len(self.names)

    def each(self) -> Iterator[slice]:
        """The rows of every patient."""
        return each(self.blocks)

    def parted(self, images: float) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
        """The blocks of patients with at most so many images, whose rows come first, and those of the others."""
        few = tuple(block for block in self.blocks if block.images <= images)
        return few, self.blocks[len(few) :]

    def sums(self, rows: Tensor) -> Tensor:
        """(Q, …) sums over each patient's rows of a tensor (n, …)."""
        if self.alone:
            return rows
        return torch.cat([rows[b.rows].reshape(b.patients, b.images, *rows.shape[1:]).sum(1) for b in self.blocks])

    def spread(self, values: Tensor) -> Tensor:
        """(n, …) each patient's value (Q, …) at each of its rows."""
        return values if self.alone else values.index_select(0, self.of_row)


def patients_of(numbers: Tensor) -> Patients:
    """Sort the rows of a batch by patient.

    Args:
        numbers: (n,) int64 in 0 … P-1, the patient of every row. On a GPU this waits for it.
    """
    here = numbers.cpu()
    counts = torch.bincount(here)  # (P,)
    names = torch.argsort(counts, stable=True)
    names = names[counts[names] > 0]  # (Q,)
    place = torch.empty_like(counts)
    place[names] = torch.arange(len(names))
    of_row, order = torch.sort(place[here], stable=True)
    images, patients = torch.unique_consecutive(counts[names], return_counts=True)
    blocks, start = [], 0
    for each, many in zip(images.tolist(), patients.tolist(), strict=True):
        blocks.append(Block(start=start, patients=many, images=each))
        start += each * many
    in_order = torch.equal(order, torch.arange(len(order)))
    return Patients(
        total=len(counts),
        order=None if in_order else order.to(numbers.device),
        names=names.to(numbers.device),
        of_row=of_row.to(numbers.device),
        blocks=tuple(blocks),
    )
