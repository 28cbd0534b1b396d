"""Lesions against a flood fill by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedmed.metrics.lesions import lesion_counts


def components(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Connected components, neighbours being all voxels of the 3 x 3 (x 3) block."""
    left = {tuple(int(at) for at in voxel) for voxel in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        component, border = set(), [left.pop()]
        while border:
            voxel = border.pop()
            component.add(voxel)
            for step in product((-1, 0, 1), repeat=mask.ndim):
                neighbour = tuple(at + by for at, by in zip(voxel, step, strict=True))
                if neighbour in left:
                    left.remove(neighbour)
                    border.append(neighbour)
        found.append(component)
    return found


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6))
    seed, share = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.05, 0.2, 0.5]))
    return tuple(np.random.default_rng(seed).random((2, *shape)) < share)


@settings(deadline=None)
@given(st.one_of(pairs(), st.tuples(arrays(np.bool_, (3, 4)), arrays(np.bool_, (3, 4)))))
def test_counts_equal_a_flood_fill(pair: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, true = (components(mask) for mask in pair)
    counts = lesion_counts(*pair)
    assert counts.true == len(true)
    assert counts.found == sum(any(lesion & other for other in predicted) for lesion in true)
    assert counts.invented == sum(not any(lesion & other for other in true) for lesion in predicted)


def test_voxels_that_share_a_corner_are_one_lesion_and_one_common_voxel_finds_it() -> None:
    true = np.zeros((5, 5, 5), dtype=bool)
    true[0, 0, 0] = true[1, 1, 1] = true[2, 2, 2] = True
    true[4, 4, 0] = True
    predicted = np.zeros_like(true)
    predicted[2, 2, 2] = predicted[2, 2, 3] = True
    predicted[0, 4, 4] = True
    assert lesion_counts(predicted, true) == (2, 1, 1)


def test_empty_masks_hold_no_lesion() -> None:
    nothing, something = np.zeros((3, 3), dtype=bool), np.ones((3, 3), dtype=bool)
    assert lesion_counts(nothing, nothing) == (0, 0, 0)
    assert lesion_counts(nothing, something) == (1, 0, 0)
    assert lesion_counts(something, nothing) == (0, 0, 1)
