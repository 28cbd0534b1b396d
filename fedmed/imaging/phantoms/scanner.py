"""X-ray units of the phantom hospitals: how each turns a picture in [0, 1] into stored values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

Plane = NDArray[np.float32]
LUT_ENTRIES, LUT_BITS = 1024, 12


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """One unit. What is stored is `(modality value - intercept) / slope`."""

    model: str
    modality: Literal["CR", "DX"]  # DX allows neither sign nor rescale (C.8.11.3)
    matrix: tuple[int, int]  # rows, columns
    spacing_mm: float
    bits: int
    signed: bool = False
    inverted: bool = False  # MONOCHROME1
    slope: float = 1.0
    intercept: float = 0.0
    display: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID", "LUT", ""] = "LINEAR"
    collimator: int = 0  # columns of Pixel Padding Value at either side
    syntax: UID = ExplicitVRLittleEndian
    gamma: float = 1.0
    noise: float = 0.02

    @property
    def lowest(self) -> int:
        """The smallest stored value."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest stored value."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def centre(self) -> float:
        """Window centre in modality units: the middle of what the unit can store."""
        return (self.lowest + self.highest) / 2 * self.slope + self.intercept

    @property
    def width(self) -> float:
        """Window width in modality units; below the full range, so that there is room on both sides."""
        return round(0.5 * (self.highest - self.lowest) * self.slope)

    @property
    def padding(self) -> int:
        """Pixel Padding Value: the darkest stored value."""
        return self.highest if self.inverted else self.lowest


SCANNERS = (
    Scanner(
        model="A", modality="CR", matrix=(128, 128), spacing_mm=2.75, bits=12,
        slope=0.5, intercept=-300.0, gamma=1.0, noise=0.015,
    ),
    Scanner(
        model="B", modality="DX", matrix=(144, 124), spacing_mm=2.5, bits=14, inverted=True,
        display="SIGMOID", syntax=RLELossless, gamma=0.9, noise=0.022,
    ),
    Scanner(
        model="C", modality="CR", matrix=(112, 128), spacing_mm=2.9, bits=16, signed=True,
        display="LUT", syntax=JPEG2000Lossless, gamma=1.1, noise=0.018,
    ),
    Scanner(
        model="D", modality="CR", matrix=(160, 160), spacing_mm=2.2, bits=10, inverted=True,
        display="", collimator=4, syntax=JPEGLSLossless, gamma=1.05, noise=0.025,
    ),
    Scanner(
        model="E", modality="CR", matrix=(136, 120), spacing_mm=2.6, bits=12, signed=True, slope=2.0, intercept=1000.0,
        display="LINEAR_EXACT", syntax=DeflatedExplicitVRLittleEndian, gamma=0.95, noise=0.015,
    ),
    Scanner(
        model="F", modality="DX", matrix=(120, 136), spacing_mm=2.7, bits=12, inverted=True,
        display="LUT", gamma=0.9, noise=0.022,
    ),
)  # fmt: skip


def stored(scanner: Scanner, picture: Plane) -> NDArray[Any]:
    """What the unit writes so that a correct reader shows `picture`.

    Args:
        scanner: the unit.
        picture: (H, W) in [0, 1], bone bright.

    Returns:
        (H, W) int16 or uint16 within `bits`.
    """
    shown = 1 - picture if scanner.inverted else picture
    values = (modality_values(scanner, shown) - scanner.intercept) / scanner.slope
    cells = np.clip(np.rint(values), scanner.lowest, scanner.highest)
    if scanner.collimator:
        cells[:, : scanner.collimator] = cells[:, -scanner.collimator :] = scanner.padding
    return cells.astype(np.int16 if scanner.signed else np.uint16)


def modality_values(scanner: Scanner, shown: Plane) -> NDArray[np.float64]:
    """The display function of the unit, backwards (PS3.3 C.11.2.1)."""
    centre, width = scanner.centre, scanner.width
    y: NDArray[np.float64] = shown.astype(np.float64)
    match scanner.display:
        case "LINEAR":
            return (y - 0.5) * (width - 1) + centre - 0.5
        case "SIGMOID":
            y = np.clip(y, 0.02, 0.98)
            return np.asarray(centre - width / 4 * np.log(1 / y - 1))
        case "LUT":
            entries = np.interp(y * (2**LUT_BITS - 1), lut(), np.arange(LUT_ENTRIES))
            return np.asarray(first_mapped(scanner) + entries)
        case _:
            return (y - 0.5) * width + centre


def lut() -> NDArray[np.uint16]:
    """A VOI LUT with a toe and a shoulder, rising throughout."""
    x = np.linspace(-1, 1, LUT_ENTRIES)
    curve = np.tanh(1.3 * x) / np.tanh(1.3)
    return np.asarray(np.rint((curve + 1) / 2 * (2**LUT_BITS - 1)), np.uint16)


def first_mapped(scanner: Scanner) -> int:
    """The modality value of the first entry of the VOI LUT: the table lies in the middle of the range."""
    return round(scanner.centre - LUT_ENTRIES / 2)
