"""DICOM objects for tests, made here so that nothing has to be fetched."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

SHAPE = (96, 80)
SECRET = "Secret-Patient-4711"


def picture(shape: tuple[int, int] = SHAPE) -> NDArray[np.float64]:
    """Smooth, with all greys from 0 to 1."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] / np.array(shape)[:, None, None]
    values = np.sin(5 * x + y) + np.cos(4 * y)
    return (values - values.min()) / np.ptp(values)


def cells_of(values: NDArray[np.float64], bits: int = 12) -> NDArray[np.uint16]:
    return np.rint(values * (2**bits - 1)).astype(np.uint16)


def image_object(cells: NDArray[Any], *, bits: int = 12, syntax: UID = ExplicitVRLittleEndian, **tags: Any) -> Dataset:
    """A DX object around stored values (H, W), (F, H, W) or (H, W, 3); `tags` are keywords, None removes one."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3.4711"
    ds.PatientID, ds.PatientName = SECRET, SECRET
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    shape = cells.shape
    if cells.ndim == 3 and shape[-1] == 3:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        shape = shape[:2]
    elif cells.ndim == 3:
        ds.NumberOfFrames, shape = shape[0], shape[1:]
    ds.Rows, ds.Columns = shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = cells.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(cells.dtype.kind == "i")
    ds.PixelData = cells.tobytes() + b"\0" * (cells.nbytes % 2)
    if syntax.is_encapsulated:
        ds.compress(syntax, generate_instance_uid=False)
    else:
        ds.file_meta.TransferSyntaxUID = syntax
    for keyword, value in tags.items():
        if value is None:
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, value)
    return ds


def item_of(**tags: Any) -> Dataset:
    """One item of a sequence."""
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item


def lut_item(table: NDArray[Any], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(table) % 2**16, first, bits])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    return item


def written(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True, overwrite=True)
    return path


def content_of(ds: Dataset) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
