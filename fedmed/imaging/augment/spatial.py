"""Moving volumes, with torch: torchvision has no third dimension."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fedmed.imaging.augment.parameters import Parameters


def moved(images: torch.Tensor, parameters: Parameters, *, nearest: bool) -> torch.Tensor:
    """Rotate, scale and shift (n, C, D, H, W), each by its own numbers, in one interpolation; 0 comes in from outside.

    The rotation is about the axis of depth: slices are thicker than pixels are wide in most volumes, and a rotation
    out of their plane would shear what it means to turn.
    """
    theta = torch.from_numpy(_inverse(parameters, tuple(images.shape[2:]))).to(images.device, images.dtype)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    mode = "nearest" if nearest else "bilinear"  # in three dimensions torch's "bilinear" is trilinear
    return functional.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


def _inverse(parameters: Parameters, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(n, 3, 4): from a place in the output to its place in the input, in torch's coordinates.

    Those run over (x, y, z) = (width, height, depth), and from -1 to 1 along every axis, so that a rotation by α among
    pixels, p_in = R(-α) (p_out - t) / s, has factors of height by width beside its sines.
    """
    _, height, width = shape
    angle = np.deg2rad(parameters.angle_deg)
    cosine, sine = np.cos(angle) / parameters.scale, np.sin(angle) / parameters.scale
    matrix = np.zeros((len(parameters), 3, 4))
    matrix[:, 0, 0] = cosine
    matrix[:, 0, 1] = sine * height / width
    matrix[:, 1, 0] = -sine * width / height
    matrix[:, 1, 1] = cosine
    matrix[:, 2, 2] = 1 / parameters.scale
    shift = 2 * parameters.shift[:, ::-1]  # a side is 2 long
    matrix[:, :, 3] = -(matrix[:, :, :3] @ shift[:, :, None])[:, :, 0]
    return matrix
