"""What is drawn for each image of a batch, and from which range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError

# Modest by default: what another positioning, another exposure or another detector could have done. They are common
# choices and not fitted to anything.
ANGLE_DEG = 10.0  # ±
SCALE = 0.10  # ±, share of the size
SHIFT = 0.05  # ±, share of a side
CONTRAST = 0.20  # ±, share of the distance from the image's mean
NOISE = 0.02  # highest standard deviation, of values in [0, 1]

# "flip" mirrors left and right. It is off unless asked for: the heart is on one side, and so may a finding's label be.
NAMES = ("flip", "rotate", "scale", "shift", "contrast", "noise")

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The numbers of n images. Neutral where a change was not asked for."""

    flip: NDArray[np.bool_]  # (n,) mirrored along the width
    angle_deg: Floats  # (n,) clockwise in the plane of height and width, about the centre
    scale: Floats  # (n,) magnification about the centre, along every axis
    shift: Floats  # (n, 2 or 3) along (depth,) height, width, share of the side, towards higher indices
    contrast: Floats  # (n,) factor of the distance from the image's mean
    noise: Floats  # (n,) standard deviation of Gaussian noise
    noise_seed: NDArray[np.int64]  # (n,)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.flip)

    @property
    def moves(self) -> bool:
        """Whether any image has to be interpolated."""
        return bool(self.angle_deg.any() or (self.scale != 1).any() or self.shift.any())


def sample(names: Sequence[str], shape: Sequence[int], count: int, generator: np.random.Generator) -> Parameters:
    """Draw the numbers of a batch.

    Everything is drawn whatever is asked for, so that another name in the list leaves the other numbers as they were.

    Args:
        names: some of `NAMES`.
        shape: of one image: (C, H, W) or (C, D, H, W).
        count: images in the batch.
        generator: moved on by the same amount for any names.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ConfigError(f'train.augment: "{unknown[0]}" is unknown; there are {", ".join(NAMES)}')
    axes = len(shape) - 1
    flip = generator.random(count) < 0.5
    angle_deg = generator.uniform(-ANGLE_DEG, ANGLE_DEG, count)
    scale = generator.uniform(1 - SCALE, 1 + SCALE, count)
    shift = generator.uniform(-SHIFT, SHIFT, (count, axes))
    contrast = generator.uniform(1 - CONTRAST, 1 + CONTRAST, count)
    noise = generator.uniform(0, NOISE, count)
    noise_seed = generator.integers(2**62, size=count)
    return Parameters(
        flip=flip & ("flip" in names),
        angle_deg=angle_deg * ("rotate" in names),
        scale=scale if "scale" in names else np.ones(count),
        shift=shift * ("shift" in names),
        contrast=contrast if "contrast" in names else np.ones(count),
        noise=noise * ("noise" in names),
        noise_seed=noise_seed,
    )
