"""Colour DICOM as RGB in [0, 1] (DICOM PS3.3 C.7.6.3.1.2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.pixels import check_header


def displayed_colour(ds: Dataset) -> NDArray[np.float32]:
    """RGB of a single-frame colour image, converted once.

    pydicom's decoder turns YBR_FULL and YBR_FULL_422 into RGB and undoes PlanarConfiguration; JPEG 2000 undoes
    YBR_ICT and YBR_RCT itself.

    Returns:
        (3, H, W) float32 in [0, 1].

    Raises:
        UnreadableImage: the header or the pixels cannot be used.
    """
    if ds.get("PhotometricInterpretation") == "PALETTE COLOR":
        check_header(ds, samples=1)
        rgb = apply_color_lut(ds.pixel_array, ds)
        bits = rgb.dtype.itemsize * 8
    else:
        check_header(ds, samples=3)
        rgb, bits = ds.pixel_array, int(ds.BitsStored)
    if rgb.ndim != 3 or rgb.shape[-1] != 3:
        raise UnreadableImage("not a colour image")
    return np.asarray(np.clip(rgb.transpose(2, 0, 1) / (2**bits - 1), 0, 1), np.float32)
