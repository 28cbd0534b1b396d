"""From where slices lie to one regular grid, or the reason why there is none (DICOM PS3.3 C.7.6.2).

What a header says about distances (Slice Thickness, Spacing Between Slices) is not asked: scanners leave gaps between
slices and series lose files. Positions decide, and a series that is not regular is refused, for a network would take
its stretched or sheared anatomy as real.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes.volume import FLIP_XY, Affine

Vector = NDArray[np.float64]

SAME_POSITION_MM = 0.01  # closer slices show the same place
UNEVEN_MM, UNEVEN_SHARE = 0.1, 0.01  # a slice may be so far from its place: the larger, in mm or of the gap
UNEVEN_AT_MOST = 0.1  # of the gap: of slices closer than 1 mm, 0.1 mm would be too much
TILT_MM, TILT_SHARE = 0.1, 0.005  # sideways from slice to slice, mm; and over the whole stack, of its length (0.3°)
UNIT_TOLERANCE = 0.01  # direction cosines are written with few digits
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where one slice lies, in DICOM's own axes (LPS, mm)."""

    position: tuple[float, float, float]  # centre of the first pixel, Image Position (0020,0032)
    along_row: tuple[float, float, float]  # direction of rising columns, Image Orientation (0020,0037)
    along_column: tuple[float, float, float]  # direction of rising rows
    spacing_mm: tuple[float, float]  # between rows, between columns: Pixel Spacing (0028,0030), vertical first

    @property
    def normal(self) -> Vector:
        """Unit vector along which slices are sorted: row × column."""
        cross = np.cross(self.along_row, self.along_column)
        return np.asarray(cross / np.linalg.norm(cross), np.float64)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Slices in order, and the grid they make."""

    order: tuple[int, ...]  # of the planes given
    affine: Affine  # (d, h, w, 1) to RAS mm


def check_plane(plane: Plane) -> None:
    """Refuse numbers that are no place.

    Raises:
        UnreadableImage: with the reason.
    """
    row, column = np.array(plane.along_row), np.array(plane.along_column)
    numbers = (*plane.position, *row, *column, *plane.spacing_mm)
    if not np.isfinite(numbers).all() or not max(map(abs, numbers)) < 1e6:
        raise UnreadableImage("a position that is not a number")
    if min(plane.spacing_mm) <= 0:
        raise UnreadableImage("a pixel spacing that is not positive")
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if abs(lengths - 1).max() > UNIT_TOLERANCE or abs(row @ column) > UNIT_TOLERANCE:
        raise UnreadableImage("rows and columns that are not perpendicular")


def stacked(planes: list[Plane]) -> Stack:
    """Sort planes of one orientation along their normal and lay a grid through them.

    The step from slice to slice is the mean of the positions' own, so the first and the last slice lie exactly where
    they say.

    Args:
        planes: of one orientation and one pixel spacing, as `check_plane` takes them.

    Raises:
        UnreadableImage: one slice, repeated positions, gantry tilt, missing slices or uneven spacing.
    """
    if len(planes) < 2:
        raise UnreadableImage("a single slice")
    positions = np.array([plane.position for plane in planes])  # (N, 3)
    distances = positions @ planes[0].normal
    order = np.argsort(distances, kind="stable")
    positions, distances = positions[order], distances[order]
    gaps = np.diff(distances)
    if gaps.min() < SAME_POSITION_MM:
        raise UnreadableImage(f"{len(planes)} slices at {1 + (gaps >= SAME_POSITION_MM).sum()} positions")
    _check_tilt(positions, distances, planes[0].normal)
    _check_gaps(distances)
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    return Stack(order=tuple(order.tolist()), affine=affine_of(planes[order[0]], step))


def affine_of(plane: Plane, step: Vector) -> Affine:
    """(d, h, w, 1) to RAS mm, for a plane and the way (3,) to the next one (PS3.3 equation C.7.6.2.1-1)."""
    between_rows, between_columns = plane.spacing_mm
    lps = np.eye(4)
    lps[:3, 0] = step
    lps[:3, 1] = np.array(plane.along_column) / np.linalg.norm(plane.along_column) * between_rows
    lps[:3, 2] = np.array(plane.along_row) / np.linalg.norm(plane.along_row) * between_columns
    lps[:3, 3] = plane.position
    return np.asarray(FLIP_XY @ lps, np.float64)


def _check_tilt(positions: Vector, distances: Vector, normal: Vector) -> None:
    """Refuse slices that do not lie behind each other: a tilted gantry shears the grid."""
    sideways = positions - np.outer(distances, normal)
    sideways = sideways - sideways[0]
    steps = np.linalg.norm(np.diff(sideways, axis=0), axis=1)
    drift = np.linalg.norm(sideways, axis=1).max()
    if steps.max() > TILT_MM or drift > max(TILT_MM, TILT_SHARE * (distances[-1] - distances[0])):
        raise UnreadableImage("gantry tilt: slices are shifted sideways against each other")


def _check_gaps(distances: Vector) -> None:
    """Refuse gaps that differ, and slices that drift away from an even spacing."""
    gaps = np.diff(distances)
    gap = float(np.median(gaps))
    tolerance = max(UNEVEN_SHARE * gap, min(UNEVEN_MM, UNEVEN_AT_MOST * gap))
    even = np.linspace(distances[0], distances[-1], len(distances))
    if np.abs(gaps - gap).max() <= tolerance and np.abs(distances - even).max() <= tolerance:
        return
    steps = np.rint(gaps / gap)
    if np.abs(gaps - steps * gap).max() <= tolerance * steps.max() and steps.min() >= 1 and steps.max() > 1:
        missing = int((steps - 1).sum())
        raise UnreadableImage(f"{in_words(missing)} {'slice is' if missing == 1 else 'slices are'} missing")
    raise UnreadableImage("slices are unevenly spaced")


def in_words(number: int) -> str:
    """Up to twelve in words."""
    return NUMBERS[number] if 0 <= number < len(NUMBERS) else str(number)
