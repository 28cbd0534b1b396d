"""From what the network was shown back to the image as it was given: without padding, in its size and orientation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from fedmed.imaging.resize import aspect_of, fitted
from fedmed.imaging.volumes.resample import onto
from fedmed.imaging.volumes.volume import Volume, canonical

Maps = NDArray[np.float32]
Bytes = NDArray[np.uint8]
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601


def without_letterbox(maps: Maps, shape: tuple[int, int], aspect: float = 1.0) -> Maps:
    """Undo `letterbox`: cut the padding off and scale back, bilinear, antialiased where that shrinks.

    Args:
        maps: (…, S, S) on the square that an image was fitted into.
        shape: H, W of the image.
        aspect: of its pixels.

    Returns:
        (…, H, W).
    """
    height, width = fitted(shape, maps.shape[-1], aspect)
    top, left = (maps.shape[-2] - height) // 2, (maps.shape[-1] - width) // 2
    inner = torch.from_numpy(np.ascontiguousarray(maps[..., top : top + height, left : left + width]))
    flat = inner.reshape(-1, 1, height, width)
    scaled = F.interpolate(flat, shape, mode="bilinear", antialias=True)
    return scaled.reshape(*maps.shape[:-2], *shape).numpy()


@dataclass(frozen=True, kw_only=True)
class Frames:
    """A picture, or the frames of a cine: planes without a place in the patient."""

    planes: Bytes = field(repr=False)  # (n, C, H, W)
    aspect: float  # how many times as high as wide a pixel is

    def back(self, maps: Maps) -> Maps:
        """Maps of one label (n, S, S), on squares, as (n, H, W)."""
        return without_letterbox(maps, (self.planes.shape[2], self.planes.shape[3]), self.aspect)

    def shown(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values (n, H, W) as they stand on a screen: as they are."""
        return values

    @property
    def grey(self) -> Bytes:
        """(n, H, W) as on a screen; colours by their luma."""
        if self.planes.shape[1] == 1:
            return self.planes[:, 0]
        luma: Bytes = np.rint(np.einsum("nchw,c->nhw", self.planes.astype(np.float32), LUMA)).astype(np.uint8)
        return luma

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Distance of rows and columns on a screen; only their ratio counts."""
        return self.aspect, 1.0


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A volume."""

    volume: Volume  # values 0 to 255, on the grid of the file
    grid: NDArray[np.float64]  # (4, 4) affine of what the network was shown
    grid_shape: tuple[int, ...]  # D', H', W' of it, before slices were fitted into squares
    squares: bool  # whether they were

    def back(self, maps: Maps) -> Maps:
        """Maps of one label, (D', H', W') or (D', S, S), on the file's grid (D, H, W), linear; 0 where none was shown.

        Args:
            maps: at least 0.
        """
        if self.squares:
            _, row_mm, column_mm = np.linalg.norm(self.grid[:3, :3], axis=0).tolist()
            shape = (self.grid_shape[1], self.grid_shape[2])
            maps = without_letterbox(maps, shape, aspect_of(row_mm, column_mm))
        there = onto(Volume(values=maps, affine=self.grid), self.volume)
        values: Maps = there.values if there.padding is None else np.where(there.padding, 0, there.values)
        return values

    def shown(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values (D, H, W) of the file's grid as axial slices, feet first, each as a radiologist looks at it.

        That is from the feet: the patient's right is on the left, and the front is up. Voxels are reordered only, so
        the planes of an oblique volume are those that come closest.
        """
        upright: NDArray[Any] = canonical(replace(self.volume, values=values)).values[:, ::-1, ::-1]
        return upright

    @property
    def grey(self) -> Bytes:
        """(n, H, W) as on a screen."""
        return self.shown(self.volume.values)

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Distance of rows and columns on a screen."""
        _, height, width = canonical(self.volume).spacing_mm
        return height, width


Original = Frames | Stack


def original_of(arrays: Mapping[str, NDArray[Any]], *, squares: bool) -> Original:
    """What the job `original` gave; `squares` if slices of it were fitted into squares."""
    if "planes" in arrays:
        return Frames(planes=arrays["planes"], aspect=float(arrays["aspect"]))
    return Stack(
        volume=Volume(values=arrays["values"], affine=arrays["affine"]),
        grid=arrays["grid"],
        grid_shape=tuple(arrays["grid_shape"].tolist()),
        squares=squares,
    )
