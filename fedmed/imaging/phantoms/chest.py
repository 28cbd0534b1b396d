"""A schematic chest radiograph: body, lungs, heart, spine, ribs, and four findings or their mimics.

Made to be hard for anything but a convolutional network (see `findings`) and quick to make: about four milliseconds
an image with its file. No picture is of a person.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.imaging.phantoms.findings import FINDINGS, stamp_

Plane = NDArray[np.float32]

CELLS = tuple((side * 0.47, height) for side in (-1, 1) for height in (-0.45, -0.02, 0.41))  # room for one patch each
PATCHES = ("cavity", "reticulation", "consolidation", "consolidation")
SPOTS = ("nodule",) * 3  # anywhere else in the lungs


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How one body stands before the detector, and how it is built. Lengths in half long sides of the picture."""

    shift: tuple[float, float]
    angle: float  # radians
    scale: float
    lung_width: float
    heart: float
    ribs: float  # phase of the rib pattern


@dataclass(frozen=True, kw_only=True)
class Thorax:
    """One drawn picture, its lungs, and where findings fit."""

    picture: Plane  # (H, W) in [0, 1], bone bright
    lungs: NDArray[np.bool_]  # (H, W)
    cells: NDArray[np.float64]  # (6, 2) row, column


def random_pose(rng: np.random.Generator) -> Pose:
    """A pose within what a radiographer would accept."""
    return Pose(
        shift=(rng.uniform(-0.07, 0.07), rng.uniform(-0.10, 0.10)),
        angle=rng.uniform(-0.06, 0.06),
        scale=rng.uniform(0.94, 1.04),
        lung_width=rng.uniform(0.31, 0.35),
        heart=rng.uniform(0.85, 1.15),
        ribs=rng.uniform(0, 2 * np.pi),
    )


def thorax(shape: tuple[int, int], pose: Pose, rng: np.random.Generator) -> Thorax:
    """Draw the anatomy without findings.

    Args:
        shape: rows and columns of the detector.
        pose: position and build.
        rng: the smooth background.
    """
    x, y = _body_coordinates(shape, pose)
    side: Plane = np.abs(x)
    half = pose.lung_width
    apex = np.sqrt(np.maximum(0.0, 1 - ((side - 0.45) / (half * 1.25)) ** 2))  # lungs narrow towards the top
    lung = np.maximum(_oval(side - 0.45, y + 0.02, half, 0.74, power=3), -(y + 0.80 * apex) * 0.8)
    lung = np.maximum(lung, y - 0.66 + 0.5 * (side - 0.42) ** 2 - 0.05 * np.sign(x))  # the domes of the diaphragm
    heart = _oval(x - 0.10, y - 0.34, 0.28 * pose.heart, 0.30, power=2)
    lung_field = _inside(lung) * (1 - _inside(heart))
    trunk = np.maximum(_oval(x, y - 0.5, 0.93, 1.45, power=4), -(y + 1.05 - 0.35 * side))
    body = np.maximum(_inside(trunk), _inside(_oval(x, y + 1.0, 0.26, 0.5, power=4)))

    shade = _clouds(x, y, rng)
    spine = np.exp(-((x / 0.09) ** 2)) * (0.07 + 0.02 * np.cos(26 * y))
    ribs = _ribs(side, y, pose) * body * (side > 0.10)
    tissue = 0.60 + 0.04 * shade + spine + 0.06 * _inside(heart)
    lungs = 0.47 + 0.04 * shade
    air = 0.32 + 0.06 * shade
    picture = air + body * (tissue - air) + lung_field * (lungs - tissue) + ribs * (0.03 + 0.02 * shade)
    cells = np.array([_detector_position(shape, pose, *cell) for cell in CELLS])
    return Thorax(picture=picture.astype(np.float32), lungs=lung_field > 0.5, cells=cells)


def chest(
    shape: tuple[int, int], labels: Mapping[str, bool], rng: np.random.Generator, *, contrast: float = 0.12
) -> Thorax:
    """One radiograph of a patient with these findings; every finding that is absent is there as its mimic.

    Args:
        shape: rows and columns of the detector.
        labels: finding -> present. All of `FINDINGS`.
        rng: pose, background, place and shape of the findings.
        contrast: root mean square of a finding over its pixels.
    """
    empty = thorax(shape, random_pose(rng), rng)
    picture = empty.picture.copy()
    pixel = max(shape) / 64
    cells = rng.permutation(empty.cells)[: len(PATCHES)] + pixel * rng.uniform(-2.5, 2.5, (len(PATCHES), 2))
    spots = _anywhere(empty.lungs, cells, len(SPOTS), rng, clear=9 * pixel)
    for name, place in zip((*PATCHES, *SPOTS), (*cells, *spots), strict=True):
        stamp_(picture, FINDINGS[name], (place[0], place[1]), labels[name], rng, contrast=contrast)
    return Thorax(picture=np.clip(picture, 0, 1), lungs=empty.lungs, cells=empty.cells)


def _anywhere(
    lungs: NDArray[np.bool_], taken: NDArray[np.float64], count: int, rng: np.random.Generator, *, clear: float
) -> NDArray[np.float64]:
    """Rows and columns of `count` pixels of the lungs, (count, 2), at least `clear` pixels from what is `taken`."""
    places = np.argwhere(lungs)
    distance = np.hypot(*(places[:, None] - taken[None]).transpose(2, 0, 1)).min(axis=1)
    free = places[distance >= min(clear, distance.max())]
    return rng.choice(free, count).astype(np.float64)


def _body_coordinates(shape: tuple[int, int], pose: Pose) -> tuple[Plane, Plane]:
    """Right and down, in half long sides from the middle of the body."""
    half = max(shape) / 2
    rows = (np.arange(shape[0], dtype=np.float32)[:, None] + 0.5 - shape[0] / 2) / half - pose.shift[1]
    columns = (np.arange(shape[1], dtype=np.float32)[None, :] + 0.5 - shape[1] / 2) / half - pose.shift[0]
    cos, sin = np.cos(pose.angle) / pose.scale, np.sin(pose.angle) / pose.scale
    return (cos * columns + sin * rows).astype(np.float32), (cos * rows - sin * columns).astype(np.float32)


def _detector_position(shape: tuple[int, int], pose: Pose, x: float, y: float) -> tuple[float, float]:
    """Row and column of a point of the body: the inverse of `_body_coordinates`."""
    half = max(shape) / 2
    cos, sin = np.cos(pose.angle) * pose.scale, np.sin(pose.angle) * pose.scale
    column, row = cos * x - sin * y + pose.shift[0], sin * x + cos * y + pose.shift[1]
    return row * half + shape[0] / 2 - 0.5, column * half + shape[1] / 2 - 0.5


def _oval(x: Plane, y: Plane, width: float, height: float, *, power: int) -> Plane:
    """About the distance to a superellipse: negative inside."""
    radius = (np.abs(x / width) ** power + np.abs(y / height) ** power) ** (1 / power)
    return np.asarray((radius - 1) * min(width, height), np.float32)


def _inside(distance: Plane) -> Plane:
    """1 inside, 0 outside, with an edge of 0.02."""
    return np.asarray(1 / (1 + np.exp(np.clip(distance / 0.018, -40, 40))), np.float32)


def _ribs(side: Plane, y: Plane, pose: Pose) -> Plane:
    """Bright arcs that fall towards the sides, and the clavicles."""
    height = y - 0.55 * (side - 0.15) + 0.45 * side**2
    arcs = np.clip(1.6 * np.cos(24 * height + pose.ribs) - 0.6, 0, 1) * (y > -0.85)
    clavicle = np.exp(-(((y + 0.80 + 0.18 * side) / 0.035) ** 2)) * (side < 0.7)
    return np.asarray(arcs + 1.5 * clavicle, np.float32)


def _clouds(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Smooth noise in about [-1, 1]: five slow waves in random directions."""
    angle, phase, wave = rng.uniform(0, 2 * np.pi, 5), rng.uniform(0, 2 * np.pi, 5), rng.uniform(1.0, 4.0, 5)
    waves = [np.cos(k * (np.cos(a) * x + np.sin(a) * y) + p) for a, p, k in zip(angle, phase, wave, strict=True)]
    return np.asarray(sum(waves[1:], waves[0]) / 2.5, np.float32)
