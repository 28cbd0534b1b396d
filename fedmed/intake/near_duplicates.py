"""Pictures that look alike: thumbnails of 24 × 24 whose correlation is above 0.975.

A resized, re-windowed or lossily compressed copy of a picture has another fingerprint and the same thumbnail. Every
pair is compared, by products of blocks of a matrix: 5.8 · 10¹² operations for 100,000 pictures, in the memory of two
blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.types import OnProgress

CORRELATION = 0.975
BLOCK = 1024  # pictures; two blocks and their product are 9 MB
MOST_PAIRS = 100_000  # that are told one by one: a set of blank or synthetic pictures has billions


@dataclass(frozen=True, kw_only=True)
class Alike:
    """What looks alike across patients or splits."""

    pairs: NDArray[np.int64]  # (n, 2) indices, the smaller one first; at most `MOST_PAIRS`
    count: int  # all of them


def near_duplicates(
    thumbnails: NDArray[np.uint8],
    patients: NDArray[np.int64],
    splits: NDArray[np.int64],
    *,
    correlation: float = CORRELATION,
    progress: OnProgress | None = None,
) -> Alike:
    """Pairs of pictures that look alike, of two patients or in two splits.

    Args:
        thumbnails: (N, 24, 24).
        patients: (N,) a number for each patient.
        splits: (N,) a number for each split.
        correlation: above which two look alike (Pearson's, over pixels).
        progress: told (done, all) in blocks.
    """
    kept: list[NDArray[np.int64]] = []
    count, told = 0, 0
    starts = range(0, len(thumbnails), BLOCK)
    for done, start in enumerate(starts, 1):
        rows = _standard(thumbnails[start : start + BLOCK])
        for other in starts[done - 1 :]:
            columns = rows if other == start else _standard(thumbnails[other : other + BLOCK])
            for pair in _pairs(rows @ columns.T > correlation, start, other, patients, splits):
                count += len(pair)
                kept.append(pair[: MOST_PAIRS - told])
                told += len(kept[-1])
        if progress is not None:
            progress(done, len(starts))
    return Alike(pairs=np.concatenate([np.zeros((0, 2), np.int64), *kept]), count=count)


def _pairs(
    alike: NDArray[np.bool_], start: int, other: int, patients: NDArray[np.int64], splits: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    if start == other:
        alike = np.triu(alike, 1)
    a, b = np.nonzero(alike)
    a, b = a + start, b + other
    apart = (patients[a] != patients[b]) | (splits[a] != splits[b])
    if apart.any():
        yield np.stack([a[apart], b[apart]], axis=1)


def _standard(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, 576) of mean 0 and length 1, so that products are correlations; 0 for a picture of one value."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(np.divide(flat, length, out=np.zeros_like(flat), where=length > 0), np.float32)
