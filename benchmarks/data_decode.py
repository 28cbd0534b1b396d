"""How fast each decoder reads each transfer syntax: one made-up radiograph of 2048 x 2048 pixels, 12 bits.

    python benchmarks/data_decode.py [--pixels 2048] [--repeats 7] [--json]

The picture is smooth with the noise of an X-ray, so that lossless codecs shrink it about as far as a real one. Times
are the best of the repeats, in one process with one thread; "whole" is everything from the file to [0, 1]. JPEG
baseline has 8 bits. The order of `fedmed.imaging.dicom.decoding.DECODERS` comes from here; decoders "not used" are
left out for the reasons that it gives.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from fedmed.imaging.dicom.decoding import decoders_of
from fedmed.imaging.reading import read_image

SYNTAXES = (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGBaseline8Bit, JPEGLosslessSV1,
            JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000)  # fmt: skip


def main() -> None:
    """Print a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=2048, help="side of the picture")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    cells = radiograph(options.pixels)
    if not options.json:
        print(f"{'transfer syntax':<56} {'decoder':<21} {'MB':>6} {'ms':>8} {'MB/s':>7} {'whole ms':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for syntax in SYNTAXES:
            path = Path(folder) / "image.dcm"
            encoded(cells, syntax).save_as(path, enforce_file_format=True, overwrite=True)
            whole_s = best_of(options.repeats, lambda path=path: read_image(path))
            ds = pydicom.dcmread(path)
            ds.PixelData  # noqa: B018 - read now, so that the disk is not timed
            bytes_decoded = ds.Rows * ds.Columns * ds.BitsAllocated // 8
            used = decoders_of(syntax)
            for name in sorted(get_decoder(syntax).available_plugins, key=lambda name: name not in used) or [""]:
                seconds = best_of(
                    options.repeats,
                    lambda ds=ds, name=name, syntax=syntax: get_decoder(syntax).as_array(ds, decoding_plugin=name),
                )
                row = {
                    "syntax": short(syntax), "decoder": name or "pydicom", "used": name in used or not name,
                    "file_mb": path.stat().st_size / 1e6,
                    "decode_ms": 1000 * seconds, "mb_per_s": bytes_decoded / seconds / 1e6, "whole_ms": 1000 * whole_s,
                }  # fmt: skip
                print(json.dumps(row) if options.json else line(row), flush=True)


def radiograph(side: int) -> np.ndarray:
    """(side, side) uint16 below 4096: a smooth body, an edge, and photon noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    body = 0.55 + 0.3 * np.sin(5 * x + y) * np.cos(4 * y) - 0.25 * (np.hypot(x - 0.3, y - 0.5) < 0.18)
    return np.clip(4095 * (body + 0.008 * rng.standard_normal((side, side))), 0, 4095).astype(np.uint16)


def encoded(cells: np.ndarray, syntax: UID) -> Dataset:
    """The picture as an object in that transfer syntax."""
    eight = syntax == JPEGBaseline8Bit
    pixels = (cells >> 4).astype(np.uint8) if eight else cells
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8, 8, 7) if eight else (16, 12, 11)
    ds.PixelData = pixels.tobytes()
    if syntax in (JPEGBaseline8Bit, JPEGLosslessSV1):
        frame = jpeg(pixels) if eight else lossless_jpeg(ds)
        ds.PixelData = encapsulate([frame])
        ds["PixelData"].VR = "OB"
    elif syntax.is_encapsulated:
        extra = {JPEGLSNearLossless: {"jls_error": 2}, JPEG2000: {"j2k_cr": [10]}}.get(syntax, {})
        ds.compress(syntax, generate_instance_uid=False, **extra)
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def jpeg(pixels: np.ndarray) -> bytes:
    """JPEG baseline by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def lossless_jpeg(ds: Dataset) -> bytes:
    """JPEG lossless, first-order prediction, by GDCM."""
    with tempfile.TemporaryDirectory() as folder:
        plain, coded = f"{folder}/plain.dcm", f"{folder}/coded.dcm"
        ds.save_as(plain, enforce_file_format=True)
        reader = gdcm.ImageReader()
        reader.SetFileName(plain)
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        writer = gdcm.ImageWriter()
        writer.SetFileName(coded)
        if not reader.Read():
            raise SystemExit("GDCM does not read its picture")
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise SystemExit("GDCM does not compress its picture")
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.Write()
        return next(pydicom.encaps.generate_frames(pydicom.dcmread(coded).PixelData, number_of_frames=1))


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def short(syntax: UID) -> str:
    """The syntax's name without what stands in brackets."""
    return syntax.name.split(" (")[0].replace(" Image Compression", "") + (" lossless" if "Only" in syntax.name else "")


def line(row: dict[str, object]) -> str:
    """One row of the table."""
    decoder = f"{row['decoder']}{'' if row['used'] else ' (not used)'}"
    return (
        f"{row['syntax']:<56} {decoder:<21} {row['file_mb']:6.2f} {row['decode_ms']:8.1f} "
        f"{row['mb_per_s']:7.0f} {row['whole_ms']:9.1f}"
    )


if __name__ == "__main__":
    main()
