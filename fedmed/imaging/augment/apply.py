"""Drawn numbers applied to a batch."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from fedmed.errors import DataError
from fedmed.imaging.augment import spatial
from fedmed.imaging.augment.parameters import Parameters

Masks = TypeVar("Masks", torch.Tensor, None)


def apply(images: torch.Tensor, masks: Masks, parameters: Parameters) -> tuple[torch.Tensor, Masks]:
    """Change images, and move their masks with them.

    Flip, then rotation, scale and shift in one interpolation (linear for images, nearest for masks), then contrast
    and noise, of images alone. What was given is not changed, but comes back as it is if nothing is to be done.

    Args:
        images: (n, C, H, W) or (n, C, D, H, W) float32 in [0, 1].
        masks: (n, L, …) of the same extent, or None.
        parameters: of n images of that kind, from `sample`.

    Returns:
        Images, in [0, 1], and masks, which hold no value that they did not hold, but for 0.

    Raises:
        DataError: the numbers are those of other images.
    """
    if len(parameters) != len(images) or parameters.shift.shape[1] != images.ndim - 2:
        raise DataError(f"numbers for {len(parameters)} images do not fit a batch of {tuple(images.shape)}")
    if not len(images):
        return images, masks
    changed = _intensities(_placed(images, parameters, nearest=False), parameters)
    return changed, masks if masks is None else _placed(masks, parameters, nearest=True)


def _placed(images: torch.Tensor, parameters: Parameters, *, nearest: bool) -> torch.Tensor:
    if parameters.flip.any():
        flip = _along(parameters.flip, images).to(torch.bool)
        images = torch.where(flip, images.flip(-1), images)
    if not parameters.moves:
        return images
    if images.ndim == 4:
        from fedmed.imaging.augment import planar  # heavy: torchvision

        return planar.moved(images, parameters, nearest=nearest)
    return spatial.moved(images, parameters, nearest=nearest)


def _intensities(images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    there = (images != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)  # (n, C, 1, 1) or (n, C, D, 1, 1)
    if (parameters.contrast != 1).any():
        mean = images.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
        images = mean + (images - mean) * _along(parameters.contrast, images)
    if parameters.noise.any():
        images = images + _along(parameters.noise, images) * _noise(images, parameters)
    return images.clamp(0, 1) * there  # zeros stay: missing modalities for late fusion, padding slices for cnn-lstm


def _noise(images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """Standard Gaussian noise, for every image from its own seed; drawn on the CPU, so that a GPU sees the same."""
    drawn = [
        torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(int(seed)))
        for seed in parameters.noise_seed
    ]
    return torch.stack(drawn).to(images.device)


def _along(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], images: torch.Tensor) -> torch.Tensor:
    """One number for each image, in a shape that spreads over it."""
    return torch.from_numpy(values).to(images.device, images.dtype).reshape(-1, *[1] * (images.ndim - 1))
