"""Overlays: a grey image with heat or outlined regions on it, as RGB for a PNG."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

LONGEST = 1024  # pixels of an overlay's long side
COLD, WARM = 0.15, 0.5  # heat below is transparent, above has its full opacity
HEAT_OPACITY, REGION_OPACITY = 0.6, 0.4
REGIONS = (  # Okabe & Ito 2008, which also the colour-blind tell apart; the order is ours
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip


def heat_overlay(grey: Bytes, heat: Floats, pixel_mm: tuple[float, float] = (1.0, 1.0)) -> Bytes:
    """An image with heat on it.

    Args:
        grey: (H, W).
        heat: (H, W) in [0, 1].
        pixel_mm: distance of rows and of columns.

    Returns:
        (h, w, 3), of square pixels, no side longer than `LONGEST`.
    """
    size = screen_size(grey.shape, pixel_mm)
    warmth = np.clip(_scaled(heat, size), 0, 1)
    opacity = HEAT_OPACITY * np.clip((warmth - COLD) / (WARM - COLD), 0, 1)
    return _blended(_scaled(grey, size), heat_colours()[np.rint(warmth * 255).astype(np.int64)], opacity)


def region_overlay(grey: Bytes, classes: NDArray[np.integer], pixel_mm: tuple[float, float] = (1.0, 1.0)) -> Bytes:
    """An image with coloured regions on it.

    Args:
        grey: (H, W).
        classes: (H, W) numbers, 0 = none.
        pixel_mm: distance of rows and of columns.

    Returns:
        As `heat_overlay`.
    """
    size = screen_size(grey.shape, pixel_mm)
    numbers = np.asarray(Image.fromarray(classes.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    return _blended(_scaled(grey, size), region_colours()[numbers], REGION_OPACITY * (numbers > 0))


def screen_size(shape: tuple[int, ...], pixel_mm: tuple[float, float]) -> tuple[int, int]:
    """Width and height in square pixels: the longer distance of pixels is stretched, and a large image is reduced."""
    height, width = (side * distance / min(pixel_mm) for side, distance in zip(shape, pixel_mm, strict=True))
    scale = min(1.0, LONGEST / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


@cache
def heat_colours() -> Bytes:
    """256 colours from dark violet over red to light yellow, whose lightness rises evenly.

    A path through OKLCh (Ottosson 2020, "A perceptual color space for image processing"): lightness from 0.2 to 0.95,
    hue from violet to yellow by way of red, chroma as high as the path, or else sRGB, allows.

    Returns:
        (256, 3) sRGB.
    """
    colours = np.zeros((256, 3), np.uint8)
    for level, place in enumerate(np.linspace(0, 1, 256).tolist()):
        lightness, hue = 0.2 + 0.75 * place, np.deg2rad(300 + 165 * place)
        chroma = 0.24 * np.sin(np.pi * (0.12 + 0.76 * place))
        linear = _linear_srgb(lightness, chroma, hue)
        while linear.min() < 0 or linear.max() > 1:  # at chroma 0 it is a grey
            chroma *= 0.98
            linear = _linear_srgb(lightness, chroma, hue)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
        colours[level] = np.rint(255 * encoded)
    return colours


@cache
def region_colours() -> Bytes:
    """(256, 3) sRGB of class numbers: black, then `REGIONS` again and again."""
    colours = [(0, 0, 0), *(REGIONS[number % len(REGIONS)] for number in range(255))]
    return np.array(colours, np.uint8)


def write_png(pixels: Bytes, path: Path) -> None:
    """Write an RGB picture (H, W, 3)."""
    Image.fromarray(pixels).save(path, format="PNG")


def write_mask(classes: Bytes, path: Path) -> None:
    """Write class numbers (H, W): a PNG of one channel with a palette, which programs read as numbers."""
    height, width = classes.shape
    image = Image.frombytes("P", (width, height), classes.tobytes())
    image.putpalette(region_colours().tobytes())
    image.save(path, format="PNG")


def _linear_srgb(lightness: float, chroma: float, hue: float) -> NDArray[np.float64]:
    """OKLCh to linear sRGB (Ottosson 2020)."""
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    to_cones = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
    )
    to_srgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.707614701],
        ]
    )
    linear: NDArray[np.float64] = to_srgb @ (to_cones @ np.array([lightness, a, b])) ** 3
    return linear


def _scaled(plane: NDArray[np.generic], size: tuple[int, int]) -> Floats:
    """(H, W) as float32 of another size, bilinear, antialiased where it shrinks."""
    whole = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(whole.resize(size, Image.Resampling.BILINEAR))


def _blended(grey: Floats, colours: Bytes, opacity: NDArray[np.floating]) -> Bytes:
    """Colours (h, w, 3) over grey (h, w), 0 to 255."""
    share = opacity[..., None]
    mixed = grey[..., None] * (1 - share) + colours * share
    pixels: Bytes = np.rint(np.clip(mixed, 0, 255)).astype(np.uint8)
    return pixels
