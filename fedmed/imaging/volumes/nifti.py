"""NIfTI-1 and NIfTI-2 in and out.

nibabel knows the format; what it must not be given is a file that nobody has checked. So a header is read by itself,
its claims are compared with the file and with `MAX_VOXELS`, and then exactly the declared bytes are read: never the
extensions, and never more than 1032 times a gzip file's length, which is the most that deflate can hold.

Array axes (i, j, k) of NIfTI are (w, h, d) here: files keep i fastest, as memory keeps w.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fedmed.errors import UnreadableImage
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.volume import MAX_VOXELS, Affine, Volume, check_affine

HEADERS: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}  # by sizeof_hdr, their length
SINGLE_FILE = {348: b"n+1\0", 540: b"n+2\0"}
MAX_OFFSET = 2**24  # bytes of extensions before the voxels
MAX_DEFLATE = 1032  # zlib's technical details: the largest ratio
REVERSED = np.eye(4)[[2, 1, 0, 3]]  # (d, h, w, 1) to (w, h, d, 1), and back
LABEL_TYPES = (np.uint8, np.int16, np.int32)  # written for labels; other tools refuse 64 bits


def read_nifti(path: Path, *, labels: bool = False) -> Volume:
    """Read a volume, scaled by scl_slope and scl_inter.

    The affine is the sform's if it has a code, else the qform's, else the pixel spacing alone, as in nibabel; in the
    last case left and right are as good as unknown. Voxels that are NaN, as some tools write outside of the brain,
    become padding.

    Args:
        path: one file, plain or gzip by its content.
        labels: whether values are class numbers.

    Returns:
        float32; or int64 for labels. Modality "".

    Raises:
        UnreadableImage: no NIfTI, not three-dimensional, larger than it may be, truncated, infinite values, or
            labels that are no whole numbers.
    """
    with plain_errors(), _opened(path) as file:
        header = _header(file)
        shape = _shape(header)
        kind, offset = _kind(header), int(header["vox_offset"])
        slope, intercept = _scaling(header)
        affine = _affine(header)
        count = int(np.prod(shape)) * kind.itemsize
        _check_size(path, shape, offset, count)
        file.seek(offset)
        raw = file.read(count)
        if len(raw) < count:
            raise UnreadableImage("truncated NIfTI")
        stored = np.frombuffer(raw, kind).reshape(shape[::-1])  # (k, j, i) is (d, h, w)
        if labels:
            return Volume(values=_labels(stored, slope, intercept), affine=affine)
        values = stored.astype(np.float32)
        if (slope, intercept) != (1, 0):
            values *= np.float32(slope)
            values += np.float32(intercept)
        return _without_nan(values, affine)


def several_volumes(path: Path) -> bool:
    """Whether a NIfTI says that it holds several volumes, as of time or modalities; False where it cannot be read."""
    try:
        with plain_errors(), _opened(path) as file:
            return max(_lengths(_header(file))[3:], default=1) > 1
    except UnreadableImage:
        return False


def write_nifti(volume: Volume, path: Path, *, version: Literal[1, 2] = 1) -> None:
    """Write a volume as .nii or .nii.gz.

    Values come back exactly, also labels. The affine does so in version 2, which keeps 64 bits; version 1, which more
    tools read, keeps its float32, exact for all that came from there, and to 0.0001 mm for DICOM.

    Args:
        volume: float32, or integers for labels, which are written in the smallest common type that holds them.
        path: ends in .nii or .nii.gz.
        version: of NIfTI.

    Raises:
        UnreadableImage: labels that need more than 32 bits.
    """
    values = volume.values
    if values.dtype.kind in "iub":
        values = values.astype(_label_type(values))
    affine = volume.affine @ REVERSED
    kind: Any = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(values.transpose(2, 1, 0), None)
    image.header.set_xyzt_units("mm")
    try:
        image.set_qform(affine, code=1, strip_shears=False)
    except HeaderDataError:  # a sheared grid is no rotation
        image.set_qform(None, code=0)
    image.header.set_zooms(volume.spacing_mm[::-1])
    image.set_sform(affine, code=1)  # scanner coordinates
    nibabel.save(image, path)


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")


def _header(file: BinaryIO) -> Any:
    head = file.read(540)
    for order in ("<", ">"):
        length = int(np.frombuffer(head[:4].ljust(4, b"\0"), f"{order}i4")[0])
        if length in HEADERS and len(head) >= length:
            magic = head[344:348] if length == 348 else head[4:8]
            if magic != SINGLE_FILE[length]:
                raise UnreadableImage("not a single-file NIfTI")
            return HEADERS[length](head[:length], endianness=order, check=False)
    raise UnreadableImage("not NIfTI")


def _lengths(header: Any) -> list[int]:
    """Along i, j, k and on."""
    dim = [int(length) for length in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise UnreadableImage("impossible dimensions")
    return dim[1 : dim[0] + 1]


def _shape(header: Any) -> tuple[int, int, int]:
    """Lengths along i, j, k."""
    lengths = _lengths(header)
    if len(lengths) < 3:
        raise UnreadableImage("a NIfTI of two dimensions, not a volume")
    if max(lengths[3:], default=1) > 1:
        raise UnreadableImage("a NIfTI of several volumes, not one")
    return lengths[0], lengths[1], lengths[2]


def _kind(header: Any) -> np.dtype[Any]:
    """The type of stored numbers."""
    try:
        kind: np.dtype[Any] = header.get_data_dtype()
    except KeyError:  # a code that nobody has defined
        kind = np.dtype(object)
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise UnreadableImage("a NIfTI of colours, complex or unusual numbers")
    return kind


def _scaling(header: Any) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or that is no number means no scaling, as in nibabel."""
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError:
        raise UnreadableImage("impossible scl_inter") from None
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept))


def _affine(header: Any) -> Affine:
    try:
        ijk = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError):
        raise UnreadableImage("no usable affine") from None
    check_affine(ijk)
    return ijk @ REVERSED


def _check_size(path: Path, shape: tuple[int, ...], offset: int, count: int) -> None:
    """Before memory is spent: a header can claim anything."""
    if not 0 <= offset <= MAX_OFFSET:
        raise UnreadableImage("impossible vox_offset")
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise UnreadableImage(f"more than {MAX_VOXELS >> 20} million voxels")
    if offset + count > path.stat().st_size * MAX_DEFLATE:
        raise UnreadableImage("truncated NIfTI")


def _labels(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[np.int64]:
    if (slope, intercept) == (1, 0) and stored.dtype.kind in "iu":
        return stored.astype(np.int64)
    values = stored.astype(np.float64) * slope + intercept
    whole = np.rint(values)
    if not np.isfinite(values).all() or np.abs(values - whole).max() > 1e-3 or np.abs(whole).max() > 2**31:
        raise UnreadableImage("labels that are no whole numbers")
    return np.asarray(whole, np.int64)


def _without_nan(values: NDArray[np.float32], affine: Affine) -> Volume:
    if np.isfinite(values).all():
        return Volume(values=values, affine=affine)
    padding = np.isnan(values)
    if padding.all() or np.isinf(values).any():
        raise UnreadableImage("values that are not numbers")
    values[padding] = values[~padding].min()
    return Volume(values=values, affine=affine, padding=padding)


def _label_type(values: NDArray[Any]) -> type:
    for kind in LABEL_TYPES:
        if np.iinfo(kind).min <= int(values.min()) and int(values.max()) <= np.iinfo(kind).max:
            return kind
    raise UnreadableImage("labels that need more than 32 bits")
