"""Colour DICOM as RGB in [0, 1] (DICOM PS3.3 C.7.6.3.1.2)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.modality import look_up
from fedmed.imaging.dicom.pixels import declared
from fedmed.imaging.plain_errors import plainly

DIRECT = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"

Colours = NDArray[np.float32]


def displayed_colours(ds: Dataset) -> Iterator[Colours]:
    """RGB of every frame, converted once.

    pydicom's decoder turns YBR_FULL and YBR_FULL_422 into RGB and undoes PlanarConfiguration; JPEG 2000 undoes
    YBR_ICT and YBR_RCT itself.

    Yields:
        (3, H, W) float32 in [0, 1].

    Raises:
        UnreadableImage: the header or the pixels cannot be used.
    """
    return plainly(_displayed_colours(ds))


def luma(colours: Colours) -> Colours:
    """(3, H, W) as one grey channel (1, H, W); grey that was stored as three equal channels is unchanged."""
    grey: Colours = colours[0] * np.float32(LUMA[0])
    for channel, weight in zip(colours[1:], LUMA[1:], strict=True):
        grey += channel * np.float32(weight)
    np.clip(grey, 0, 1, out=grey)
    return grey.reshape(1, *grey.shape)


def _palette(ds: Dataset) -> tuple[int, Colours]:
    """The first index that a palette maps, and its colours (3, entries) in [0, 1] (C.7.6.3.1.5, C.7.6.3.1.6).

    Not by pydicom alone, which (3.0) wraps indices above 255 where entries have 8 bits, and divides 8 bits that were
    written into cells of 16 by the range of 16. It expands segmented palettes.
    """
    if "RedPaletteColorLookupTableDescriptor" not in ds:
        raise UnreadableImage("colour image without its palette")
    entries, lowest, bits = (int(number) for number in ds.RedPaletteColorLookupTableDescriptor)
    entries = entries or 2**16
    indices = np.arange(lowest, lowest + entries)
    if "RedPaletteColorLookupTableData" in ds:
        if len(ds.RedPaletteColorLookupTableData) <= entries + 1:
            bits = 8  # whatever the descriptor says
        item = Dataset()
        item.set_original_encoding(*ds.original_encoding)
        item.LUTDescriptor = [entries % 2**16, lowest, bits]
        tables = []
        for colour in ("Red", "Green", "Blue"):
            item.LUTData = ds[f"{colour}PaletteColorLookupTableData"].value
            tables.append(look_up(item, indices))
        colours = np.stack(tables)
    else:
        colours = apply_color_lut(indices, ds).T[:3]
    highest = 2 ** (16 if colours.max() > 255 else bits) - 1
    return lowest, colours.astype(np.float32) / np.float32(highest)


def _displayed_colours(ds: Dataset) -> Iterator[Colours]:
    claims = declared(ds)
    palette = claims.photometric == "PALETTE COLOR"
    if not palette and claims.photometric not in DIRECT:
        raise UnreadableImage("not a colour image")
    if claims.keyword != "PixelData" or claims.samples != (1 if palette else 3) or claims.allocated not in (8, 16):
        raise UnreadableImage("not a colour image")
    lowest, colours = _palette(ds) if palette else (0, None)
    for _, stored in zip(range(claims.frames), stored_frames(ds), strict=False):
        if colours is not None:
            yield colours[:, np.clip(stored.astype(np.int64) - lowest, 0, colours.shape[1] - 1)]
            continue
        shown = np.empty((3, *stored.shape[:2]), np.float32)
        shown[...] = stored.transpose(2, 0, 1)
        shown /= np.float32(2**claims.stored - 1)
        np.clip(shown, 0, 1, out=shown)
        yield shown
