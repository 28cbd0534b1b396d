"""Distances of surfaces against brute force over all pairs of surface voxels, and by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedmed.metrics.surfaces import surface, surface_distances, surface_scores

UNIT = np.ones(2)


def surface_by_hand(mask: np.ndarray) -> list[tuple[int, ...]]:
    """The voxels of a mask with a neighbour along an axis that is background or beyond the image."""
    found = []
    for voxel in zip(*np.nonzero(mask), strict=True):
        for axis, step in product(range(mask.ndim), (-1, 1)):
            neighbour = list(voxel)
            neighbour[axis] += step
            outside = not all(0 <= at < size for at, size in zip(neighbour, mask.shape, strict=True))
            if outside or not mask[tuple(neighbour)]:
                found.append(tuple(int(at) for at in voxel))
                break
    return found


def distances_by_hand(first: np.ndarray, second: np.ndarray, spacing_mm: np.ndarray) -> list[float]:
    """From each surface voxel of the first mask, the way to the nearest of the second."""
    targets = surface_by_hand(second)
    return [
        min(
            math.sqrt(sum(((a - b) * mm) ** 2 for a, b, mm in zip(here, there, spacing_mm, strict=True)))
            for there in targets
        )
        for here in surface_by_hand(first)
    ]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two masks that are not empty, in two or three dimensions, and a spacing."""
    shape = draw(array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5))
    first, second = (draw(arrays(np.bool_, shape).filter(np.any)) for _ in range(2))
    spacing = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(shape), max_size=len(shape)))
    return first, second, np.array(spacing)


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_distances_equal_brute_force(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    first, second, spacing = pair
    there, back = distances_by_hand(*pair), distances_by_hand(second, first, spacing)
    found = surface_distances(*pair)
    np.testing.assert_allclose(found[0], there, rtol=1e-12)
    np.testing.assert_allclose(found[1], back, rtol=1e-12)
    scores = surface_scores(*pair)
    assert scores.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert scores.assd == pytest.approx(np.mean([*there, *back]))


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_order_of_the_masks_and_reflection_change_nothing(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    first, second, spacing = pair
    scores = surface_scores(first, second, spacing)
    assert surface_scores(second, first, spacing) == pytest.approx(scores)
    assert surface_scores(np.flip(first), np.flip(second), spacing) == pytest.approx(scores)


@settings(max_examples=50, deadline=None)
@given(pairs(), st.sampled_from([0.25, 2.0, 8.0]))
def test_distances_grow_with_the_spacing(pair: tuple[np.ndarray, np.ndarray, np.ndarray], factor: float) -> None:
    first, second, spacing = pair
    scores = np.array(surface_scores(first, second, spacing))
    np.testing.assert_allclose(surface_scores(first, second, factor * spacing), factor * scores)
    assert surface_scores(first, first, spacing) == (0, 0)


def test_surface_of_a_cube_is_its_shell_also_at_the_border_of_the_image() -> None:
    cube = np.zeros((6, 6, 6), dtype=bool)
    cube[:4, 1:5, 1:5] = True
    shell = cube.copy()
    shell[1:3, 2:4, 2:4] = False
    np.testing.assert_array_equal(surface(cube), shell)


def test_two_pixels_three_apart_along_an_axis_of_two_millimetres_are_six_millimetres_apart() -> None:
    first, second = np.zeros((2, 8, 8), dtype=bool)
    first[1, 4] = second[4, 4] = True
    assert surface_scores(first, second, np.array([2.0, 1.0])) == (6, 6)


def test_hd95_is_the_larger_directed_percentile_and_not_that_of_all_distances_together() -> None:
    first = np.zeros((1, 40), dtype=bool)
    second = first.copy()
    first[0, :19] = True
    second[0, [*range(19), 38]] = True  # one of twenty is 20 away: directed percentiles 0 and 0.05 * 20
    assert surface_scores(first, second, UNIT).hd95 == pytest.approx(1.0)
    assert np.percentile([0] * 38 + [20], 95) == 0
    assert surface_scores(first, second, UNIT).assd == pytest.approx(20 / 39)


@pytest.mark.parametrize("empty", ["first", "second", "both"])
def test_an_empty_mask_has_no_distance(empty: str) -> None:
    first = np.full((3, 3), empty == "second")
    second = np.full((3, 3), empty == "first")
    assert np.isnan(surface_scores(first, second, UNIT)).all()
