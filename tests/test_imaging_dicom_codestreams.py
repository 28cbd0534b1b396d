"""Compressed frames that ask for something else than their header, or would crash, hang or mislead a decoder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import SHAPE, cells_of, image_object, picture, written
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
    VLEndoscopicImageStorage,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.codestream import coded_size
from fedmed.imaging.reading import read_frames, read_image

CELLS = cells_of(picture())


def test_a_compressed_frame_of_another_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        large = image_object(cells_of(picture((200, 90))), syntax=syntax)
        ds = image_object(CELLS, syntax=syntax)
        ds.PixelData = large.PixelData
        if syntax == RLELossless:
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7  # RLE counts bytes of samples, not rows
        with pytest.raises(UnreadableImage, match="another size"):
            read_image(written(ds, tmp_path / "x"))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_codestream_says_its_size(syntax: UID) -> None:
    data = image_object(CELLS, syntax=syntax).PixelData
    frame = next(pydicom.encaps.generate_frames(data, number_of_frames=1))
    coded = coded_size(frame)
    assert (coded.rows, coded.columns, coded.samples) == (*SHAPE, 1)
    assert coded.bits in (12, 16)
    for length in range(40):
        with pytest.raises(UnreadableImage, match=r"truncated|damaged"):
            coded_size(frame[: min(length, 8)])


def test_a_box_of_no_length_does_not_run_for_ever() -> None:
    with pytest.raises(UnreadableImage, match="damaged"):
        coded_size(b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0ftyp" + b"\0" * 64)


def test_millions_of_tiles_are_refused() -> None:
    size = b"".join(number.to_bytes(4) for number in (4096, 4096, 0, 0, 1, 1, 0, 0))
    with pytest.raises(UnreadableImage, match="damaged"):
        coded_size(b"\xff\x4f\xff\x51\0\x29\0\0" + size + b"\0\1\7\1\1")


def test_a_truncated_jpeg_is_not_filled_up(tmp_path: Path) -> None:
    """GPL libjpeg would: it must not stand in where the others refuse."""
    buffer = io.BytesIO()
    Image.fromarray(cells_of(picture(), 8).astype(np.uint8)).save(buffer, "JPEG")
    ds = image_object(cells_of(picture(), 8).astype(np.uint8), bits=8)
    ds["PixelData"].VR = "OB"
    for syntax in (JPEGBaseline8Bit, JPEGExtended12Bit):
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([buffer.getvalue()])
        np.testing.assert_allclose(read_image(written(ds, tmp_path / "x"))[0], picture(), atol=0.05)
        for share in (0.3, 0.6, 0.95):
            ds.PixelData = encapsulate([buffer.getvalue()[: int(share * len(buffer.getvalue()))]])
            with pytest.raises(UnreadableImage, match="compressed pixels"):
                read_image(written(ds, tmp_path / "x"))


@pytest.mark.parametrize("adobe", [b"", b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1"])
@pytest.mark.parametrize("jfif", [True, False])
def test_a_jpeg_in_colour_is_converted_once_whatever_its_markers_say(tmp_path: Path, adobe: bytes, jfif: bool) -> None:
    rgb = np.stack([picture(), picture()[::-1], np.full(SHAPE, 0.2)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((rgb * 255).astype(np.uint8)).save(buffer, "JPEG", quality=98, subsampling=0)
    whole = buffer.getvalue()
    assert whole[2:4] == b"\xff\xe0" and whole[4:6] == b"\0\x10"
    frame = whole[:2] + (whole[2:20] if jfif else b"") + adobe + whole[20:]
    ds = image_object((rgb * 255).astype(np.uint8), bits=8, SOPClassUID=VLEndoscopicImageStorage)
    ds.PhotometricInterpretation, ds.file_meta.TransferSyntaxUID = "YBR_FULL_422", JPEGBaseline8Bit
    ds["PixelData"].VR = "OB"
    ds.PixelData = encapsulate([frame, frame])
    ds.NumberOfFrames = 2
    for shown in read_frames(written(ds, tmp_path / "x"), "color"):
        np.testing.assert_allclose(shown, rgb.transpose(2, 0, 1), atol=0.03)


def test_rle_that_runs_over_its_end_is_refused(tmp_path: Path) -> None:
    """The fast decoder panics, which is no Exception in Python."""
    cells = np.zeros((8, 8), np.uint16)
    for size in (63, 64, 65, 128):
        segment = bytes([size - 1]) + bytes(size)
        header = np.array([2, 64, 64 + len(segment)] + [0] * 13, "<u4").tobytes()
        ds = image_object(cells, bits=16, syntax=RLELossless, PixelData=encapsulate([header + segment * 2]))
        path = written(ds, tmp_path / "x")
        if size == 64:
            assert not read_image(path).any()
        else:
            with pytest.raises(UnreadableImage, match="compressed pixels"):
                read_image(path)


def test_a_marker_segment_of_a_wrong_length_is_refused_before_gdcm_aborts(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = (Path(pydicom.__file__).parent / "data" / "test_files" / "SC_rgb_jpeg_gdcm.dcm").read_bytes()
    path.write_bytes(content)
    assert read_image(path, preset="color").any()
    table = content.index(b"\xff\xc4") + 2  # Huffman tables
    length = int.from_bytes(content[table : table + 2])
    for other in (0, 1, length - 1, length + 1, 0xFFFF):
        path.write_bytes(content[:table] + other.to_bytes(2) + content[table + 2 :])
        with pytest.raises(UnreadableImage, match=r"damaged|truncated"):
            read_image(path, preset="color")


def test_jpeg_ls_without_its_end_is_refused_before_its_decoder_searches_for_it(tmp_path: Path) -> None:
    frame = next(
        pydicom.encaps.generate_frames(image_object(CELLS, syntax=JPEGLSLossless).PixelData, number_of_frames=1)
    )
    ds = image_object(CELLS, syntax=JPEGLSLossless, PixelData=encapsulate([frame.rstrip(b"\0")[:-2]]))
    with pytest.raises(UnreadableImage, match=r"^truncated compressed pixels$"):
        read_image(written(ds, tmp_path / "x"))
