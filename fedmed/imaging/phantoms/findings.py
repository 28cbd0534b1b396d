"""Four findings of the chest phantom, and the mimic of each: same place, same energy, zero mean, label 0.

A finding adds nothing to the mean, the variance or the low frequencies of a picture that its mimic does not add as
well; what tells them apart is their fine shape alone, which is what a convolution sees. Lengths are in pixels of a
picture whose long side is 64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
Pattern = Callable[[Plane, Plane, bool, np.random.Generator], Plane]

REACH = 9.0  # no finding extends further from its centre


def nodule(x: Plane, y: Plane, present: bool, rng: np.random.Generator) -> Plane:
    """A spot: difference of Gaussians, bright centre. Mimic: dark centre."""
    radius = rng.uniform(2.5, 3.5)
    squared = x * x + y * y
    centre, surround = np.exp(-squared / (2 * (0.6 * radius) ** 2)), np.exp(-squared / (2 * (0.95 * radius) ** 2))
    return _balanced(_signed(centre, present), surround, energy=2.9)


def cavity(x: Plane, y: Plane, present: bool, rng: np.random.Generator) -> Plane:
    """A ring with a bright wall. Mimic: a dark wall."""
    radius = np.hypot(x, y)
    wall = np.exp(-((radius - rng.uniform(5.0, 6.0)) ** 2) / 2)
    return _balanced(_signed(wall, present), _disc(radius, 8.0), energy=2.1)


def reticulation(x: Plane, y: Plane, present: bool, rng: np.random.Generator) -> Plane:
    """Fine lines that cross at right angles. Mimic: stripes in one direction, stronger by √2."""
    angle, wave = np.pi / 2 + rng.uniform(-0.35, 0.35), 2 * np.pi / rng.uniform(4.0, 5.0)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    first, second = rng.uniform(0, 2 * np.pi, 2)
    lines = np.cos(wave * along + first)
    if present:
        lines = lines + np.cos(wave * across + second)
    return _balanced(lines, _disc(np.hypot(x, y), 7.0), energy=1.8)


def consolidation(x: Plane, y: Plane, present: bool, rng: np.random.Generator) -> Plane:
    """Speckle of sparse bright grains. Mimic: sparse dark grains."""
    distance, angle = 7.5 * np.sqrt(rng.uniform(0, 1, 14)), rng.uniform(0, 2 * np.pi, 14)
    grains = np.zeros_like(x)
    for grain_x, grain_y in zip(distance * np.cos(angle), distance * np.sin(angle), strict=True):
        grains += np.exp(-((x - grain_x) ** 2 + (y - grain_y) ** 2) / (2 * 0.8**2))
    return _balanced(_signed(grains, present), _disc(np.hypot(x, y), 7.0), energy=1.7)


FINDINGS: dict[str, Pattern] = {
    "nodule": nodule,
    "cavity": cavity,
    "reticulation": reticulation,
    "consolidation": consolidation,
}


def stamp_(
    picture: Plane,
    pattern: Pattern,
    centre: tuple[float, float],
    present: bool,
    rng: np.random.Generator,
    *,
    contrast: float,
) -> None:
    """Add a finding (or its mimic) to a picture, in place.

    Args:
        picture: (H, W).
        pattern: one of `FINDINGS`.
        centre: row and column, pixels of the picture.
        present: the finding, or its mimic.
        rng: where size, angle and grains come from.
        contrast: root of the energy per reference pixel.
    """
    scale = max(picture.shape) / 64
    half = int(np.ceil(REACH * scale))
    top, left = (max(0, int(at) - half) for at in centre)
    window = picture[top : int(centre[0]) + half + 1, left : int(centre[1]) + half + 1]
    rows, columns = np.indices(window.shape, dtype=np.float32)
    y, x = (rows + top - centre[0]) / scale, (columns + left - centre[1]) / scale
    window += contrast * pattern(x.astype(np.float32), y.astype(np.float32), present, rng)


def _signed(values: Plane, positive: bool) -> Plane:
    return values if positive else -values


def _disc(radius: Plane, size: float) -> Plane:
    """1 inside, 0 outside, with an edge of about a pixel."""
    return np.asarray(1 / (1 + np.exp(np.minimum((radius - size) / 0.5, 50))), np.float32)


def _balanced(values: Plane, weight: Plane, *, energy: float) -> Plane:
    """`values` under `weight`, shifted to zero mean and scaled to a fixed root mean square over the weighted pixels."""
    values = weight * (values - np.sum(weight * values) / np.sum(weight))
    return np.asarray(values * energy / np.sqrt(np.sum(values**2) / np.sum(weight**2)), np.float32)
