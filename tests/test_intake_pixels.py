"""Text beside the picture in compressed pixels, wherever a codec allows it: it goes, and the picture stays the same."""

import io
import tracemalloc
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from dicom_files import cells_of, content_of, image_object, picture, written
from hypothesis import given
from hypothesis import strategies as st
from intake_files import NAME, PLANTED, cleaned, named_object, pseudonyms_in
from PIL import Image
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from fedmed.imaging.reading import read_image
from fedmed.intake.keep import keep
from fedmed.intake.pixels import _without_comments, cleaned_pixels_

TEXT = NAME.encode()


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (2 + len(content)).to_bytes(2) + content


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4) + kind + content


def frame_of(syntax: UID) -> bytes:
    """A picture without text."""
    if syntax != JPEGBaseline8Bit:
        (frame,) = pydicom.encaps.generate_frames(named_object(syntax=syntax).PixelData, number_of_frames=1)
        return frame
    buffer = io.BytesIO()
    Image.fromarray(cells_of(picture(), 8).astype(np.uint8)).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def in_a_tile(frame: bytes) -> bytes:
    """With a comment in the header of its tile part."""
    comment = segment(0x64, b"\0\1" + TEXT)
    place = frame.index(b"\xff\x90")
    length = int.from_bytes(frame[place + 6 : place + 10]) + len(comment)
    return frame[: place + 6] + length.to_bytes(4) + frame[place + 10 : place + 12] + comment + frame[place + 12 :]


def in_boxes(frame: bytes) -> bytes:
    """As JP2, with boxes of text before and after the codestream."""
    rows, columns = picture().shape
    header = rows.to_bytes(4) + columns.to_bytes(4) + b"\0\1" + bytes((11, 7, 0, 0))
    described = box(b"ihdr", header) + box(b"colr", b"\1\0\0" + (17).to_bytes(4))
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + box(b"jp2h", described)
    return start + box(b"uuid", 16 * b"u" + TEXT) + box(b"jp2c", in_a_tile(frame)) + box(b"xml ", TEXT) + b"Quislin"


def before_the_end(frame: bytes) -> bytes:
    end = frame.rindex(b"\xff\xd9")
    return frame[:end] + segment(0xFE, TEXT) + frame[end:]


@pytest.mark.parametrize(
    ("syntax", "hidden"),
    [
        (JPEGBaseline8Bit, before_the_end),
        (JPEGBaseline8Bit, lambda frame: frame + TEXT),
        (JPEGLSLossless, before_the_end),
        (JPEGLSLossless, lambda frame: frame + TEXT),
        (JPEG2000Lossless, in_a_tile),
        (JPEG2000Lossless, lambda frame: frame + TEXT),
        (JPEG2000Lossless, in_boxes),
    ],
)
def test_text_beside_the_picture_is_blanked_wherever_it_stands(syntax, hidden, tmp_path: Path):
    small = {"cells": cells_of(picture(), 8).astype(np.uint8), "bits": 8} if syntax == JPEGBaseline8Bit else {}
    ds = named_object(**small)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = pydicom.encaps.encapsulate([frame_of(syntax)])
    ds["PixelData"].is_undefined_length = True
    before = read_image(written(ds, tmp_path / "before"))
    ds.PixelData = pydicom.encaps.encapsulate([hidden(frame_of(syntax))])
    assert b"Quislin" in ds.PixelData
    clean = cleaned(ds, pseudonyms_in(tmp_path))
    assert not any(word.encode() in content_of(clean).lower() for word in (*PLANTED, "quislin"))
    assert (read_image(written(clean, tmp_path / "after")) == before).all()


def lossless_jpeg(cells: np.ndarray, path: Path) -> bytes:
    """Pixels in JPEG Lossless, which pydicom cannot write."""
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(written(image_object(cells, bits=8 * cells.itemsize), path)))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return bytes(pydicom.dcmread(path).PixelData)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1]
)
@pytest.mark.parametrize(("cells", "bits"), [(cells_of(picture()), 12), (cells_of(picture(), 7).astype(np.uint8), 7)])
def test_overlays_in_unused_bits_are_blanked_whatever_the_codec(syntax, cells, bits, tmp_path: Path):
    hidden, whole = cells.copy(), 8 * cells.itemsize
    hidden[10:20, 10:20] |= 1 << (whole - 1)
    plain = syntax in (ExplicitVRLittleEndian, JPEGLosslessSV1)
    ds = named_object(cells=hidden, bits=whole, **({} if plain else {"syntax": syntax}))
    if syntax == JPEGLosslessSV1:
        ds.file_meta.TransferSyntaxUID, ds.PixelData = syntax, lossless_jpeg(hidden, tmp_path / "jpeg")
        ds["PixelData"].is_undefined_length = True
    ds.BitsStored, ds.HighBit = bits, bits - 1
    kept = keep(ds, tmp_path / "out", pseudonyms_in(tmp_path))
    assert kept.reason is None
    found = pydicom.dcmread(kept.path)
    assert (np.frombuffer(found.PixelData, cells.dtype).reshape(cells.shape) == cells).all()
    np.testing.assert_allclose(read_image(kept.path)[0], picture(), atol=1 / 127)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_large_object_is_cleaned_block_by_block_and_not_copied_where_nothing_hides(hidden: bool):
    cells = np.arange(2**23, dtype=np.uint16) & 0x0FFF  # 16 MiB
    ds = named_object(cells=cells.reshape(16, 1024, 512), bits=16)
    ds.BitsStored, ds.HighBit = 12, 11
    whole = cells.copy()
    whole[5_000_000] |= 0x8000 if hidden else 0
    data = ds.PixelData = whole.tobytes()
    tracemalloc.start()
    cleaned_pixels_(ds)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (np.frombuffer(ds.PixelData, np.uint16) == cells).all() and (ds.PixelData is data) is not hidden
    assert peak < len(data) * (1.5 if hidden else 0.5)


def test_compressed_pixels_with_nothing_in_their_unused_bits_stay_compressed(tmp_path: Path):
    pseudonyms = pseudonyms_in(tmp_path)
    for number, syntax in enumerate((RLELossless, JPEGLSLossless)):
        kept = keep(named_object(number, syntax=syntax), tmp_path / "out", pseudonyms)
        assert pydicom.dcmread(kept.path).file_meta.TransferSyntaxUID == syntax


@given(st.sampled_from([JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless]), st.binary(max_size=40), st.integers(0))
def test_damaged_frames_end_and_never_grow(syntax, damage, place):
    frame = in_boxes(frame_of(syntax)) if syntax == JPEG2000Lossless and place % 2 else frame_of(syntax)
    place %= len(frame)
    broken = frame[:place] + damage + frame[place + len(damage) :]
    assert len(_without_comments(broken)) <= len(broken)
