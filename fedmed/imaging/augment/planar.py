"""Moving pictures, with torchvision."""

from __future__ import annotations

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from fedmed.imaging.augment.parameters import Parameters


def moved(images: torch.Tensor, parameters: Parameters, *, nearest: bool) -> torch.Tensor:
    """Rotate, scale and shift (n, C, H, W), each by its own numbers, in one interpolation; 0 comes in from outside."""
    height, width = images.shape[-2:]
    mode = InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR
    return torch.stack(
        [
            functional.affine(
                image,
                angle=float(angle),
                translate=[float(right) * width, float(down) * height],
                scale=float(scale),
                shear=[0.0, 0.0],
                interpolation=mode,
            )
            for image, angle, scale, (down, right) in zip(
                images, parameters.angle_deg, parameters.scale, parameters.shift, strict=True
            )
        ]
    )
