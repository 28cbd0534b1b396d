"""DICOM files as hospitals send them: kinds that are left out, colour, frames, lies in headers, damage."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, cells_of, content_of, image_object, picture, written
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import convert_color_space
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSLossless,
    MRImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    VLEndoscopicImageStorage,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.decoding import decoders_of
from fedmed.imaging.dicom.kinds import FAMILIES, KINDS, check_kind
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.reading import read_frames, read_image

CELLS = cells_of(picture())
RGB = np.random.default_rng(0).integers(0, 256, (24, 18, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelData": None}, "no pixels"),
        ({"Rows": None}, "header lacks Rows"),
        ({"BitsStored": None}, "header lacks BitsStored"),
        ({"Rows": 0}, "no rows or columns"),
        ({"Rows": 97}, "truncated pixels"),
        ({"Rows": 65535, "Columns": 65535}, "larger than 512 MiB"),
        ({"NumberOfFrames": 30000000}, "all frames together larger than 4096 MiB"),
        ({"NumberOfFrames": -1}, "impossible number of frames"),
        ({"NumberOfFrames": 2, "Rows": 48}, 'multi-frame; data.items = "slices"'),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour image"),
        ({"PhotometricInterpretation": "CMYK"}, "colour image"),
        ({"SamplesPerPixel": 2}, "impossible number of samples"),
        ({"BitsAllocated": 12, "HighBit": 11}, "impossible bit depth"),
        ({"BitsStored": 17, "HighBit": 16}, "impossible bit depth"),
        ({"HighBit": 3}, "impossible bit depth"),
        ({"PixelRepresentation": 7}, "impossible pixel representation"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "rescale slope is zero"),
        ({"WindowCenter": 1, "WindowWidth": 10, "VOILUTFunction": "CUBIC"}, "unknown VOI LUT function"),
        ({"SOPClassUID": DigitalXRayImageStorageForProcessing}, "for processing"),
        ({"SOPClassUID": DigitalMammographyXRayImageStorageForProcessing}, "for processing"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary capture"),
        ({"SOPClassUID": SegmentationStorage}, "a segmentation"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33"}, "a report"),
        ({"SOPClassUID": "1.2.840.113619.4.30"}, "a private kind of object"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.9999"}, "no image to train on"),
    ],
)  # fmt: skip
def test_refuses_with_a_reason_and_without_a_name(tmp_path: Path, tags: dict[str, Any], reason: str) -> None:
    path = written(image_object(CELLS, **tags), tmp_path / f"{SECRET}.dcm")
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(path)
    assert SECRET not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_no_refusal_holds_a_uid_or_a_number_from_a_header() -> None:
    reasons = {kind.refusal for kind in KINDS.values()} | {reason for _, reason in FAMILIES}
    assert all(not any(letter.isdigit() for letter in reason) for reason in reasons)


def test_an_object_without_a_kind_is_refused() -> None:
    ds = image_object(CELLS, SOPClassUID=None)
    with pytest.raises(UnreadableImage, match="header lacks SOPClassUID"):
        check_kind(ds)
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    assert check_kind(ds).modality == "ct"


@pytest.mark.parametrize("implicit", [True, False])
def test_an_object_that_was_stored_without_file_meta_information_is_read(tmp_path: Path, implicit: bool) -> None:
    ds = image_object(CELLS)
    expected = read_image(written(ds, tmp_path / "whole"))
    ds.file_meta, ds.preamble = FileMetaDataset(), None
    ds.save_as(tmp_path / "bare", implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "bare").read_bytes()[:2] == b"\x08\x00"
    assert is_dicom(tmp_path / "bare") and (read_image(tmp_path / "bare") == expected).all()
    for other in (b"\x08\x00" * 80, b"\x08\x00\x05\x00\x04\x00\x00\x00text\x10\x00", b"\x08\x00", b""):
        (tmp_path / "other").write_bytes(other)
        assert not is_dicom(tmp_path / "other")


def test_secondary_captures_are_let_in_by_presets_that_say_so(tmp_path: Path) -> None:
    grey = written(image_object(CELLS, SOPClassUID=SecondaryCaptureImageStorage), tmp_path / "grey")
    np.testing.assert_allclose(read_image(grey, preset="cxr-sc")[0], picture(), atol=1e-3)
    loop = np.stack([RGB, RGB[::-1]])
    ds = image_object(RGB, bits=8, SOPClassUID=MultiFrameTrueColorSecondaryCaptureImageStorage, NumberOfFrames=2,
                      PixelData=loop.tobytes())  # fmt: skip
    frames = list(read_frames(written(ds, tmp_path / "loop"), preset="color"))
    np.testing.assert_allclose(frames, loop.transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_colour_under_color_and_under_cxr(tmp_path: Path) -> None:
    path = written(image_object(RGB, bits=8, SOPClassUID=VLEndoscopicImageStorage), tmp_path / "x")
    np.testing.assert_allclose(read_image(path, preset="color"), RGB.transpose(2, 0, 1) / 255, atol=1e-6)
    with pytest.raises(UnreadableImage, match="colour image"):
        read_image(path)
    with pytest.raises(UnreadableImage, match="colour image"):
        read_image(
            written(image_object(RGB[..., :1].repeat(3, 2), bits=8, SOPClassUID=MRImageStorage), path), preset="mr"
        )
    grey = written(image_object(RGB[..., 0], bits=8), tmp_path / "y")
    assert read_image(grey, preset="color").shape == (3, 24, 18)


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("us", UltrasoundImageStorage),
        ("cxr-sc", SecondaryCaptureImageStorage),
        ("cxr", DigitalXRayImageStorageForPresentation),
    ],
)
@pytest.mark.parametrize("planar", [0, 1])
def test_grey_that_is_stored_in_colours_is_one_channel(tmp_path: Path, planar: int, preset: str, kind: UID) -> None:
    grey = np.repeat(RGB[..., :1], 3, axis=2)
    ds = image_object(grey, bits=8, SOPClassUID=kind)
    if planar:
        ds.PlanarConfiguration, ds.PixelData = 1, grey.transpose(2, 0, 1).tobytes()
    shown = read_image(written(ds, tmp_path / "x"), preset=preset)
    np.testing.assert_allclose(shown[0], grey[..., 0] / 255, atol=1e-5)


def test_ybr_is_converted_once(tmp_path: Path) -> None:
    ybr = convert_color_space(RGB, "RGB", "YBR_FULL")
    ds = image_object(ybr, bits=8, PhotometricInterpretation="YBR_FULL", SOPClassUID=UltrasoundImageStorage)
    shown = read_image(written(ds, tmp_path / "x"), preset="color")
    np.testing.assert_allclose(shown, RGB.transpose(2, 0, 1) / 255, atol=2 / 255)


def test_half_resolved_colours_have_two_thirds_of_the_bytes(tmp_path: Path) -> None:
    luma = np.arange(24 * 18, dtype=np.uint16).reshape(24, 18) % 256
    pairs = np.full((24, 9, 4), 128, np.uint8)
    pairs[..., :2] = luma.reshape(24, 9, 2)
    ds = image_object(RGB, bits=8, PhotometricInterpretation="YBR_FULL_422", SOPClassUID=UltrasoundImageStorage,
                      PixelData=pairs.tobytes())  # fmt: skip
    shown = read_image(written(ds, tmp_path / "x"), preset="us")
    np.testing.assert_allclose(shown[0], luma / 255, atol=1.5 / 255)


def test_palette_colours(tmp_path: Path) -> None:
    ds = image_object(np.arange(256, dtype=np.uint8).reshape(16, 16), bits=8, SOPClassUID=UltrasoundImageStorage,
                      PhotometricInterpretation="PALETTE COLOR")  # fmt: skip
    for name, step in (("Red", 1), ("Green", 2), ("Blue", 3)):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        ds.add_new(f"{name}PaletteColorLookupTableData", "OW", (np.arange(256, dtype="<u2") * step * 80).tobytes())
    shown = read_image(written(ds, tmp_path / "x"), preset="color")
    expected = np.arange(256).reshape(16, 16) * 80 / 65535
    np.testing.assert_allclose(shown, np.stack([expected, 2 * expected, 3 * expected]), atol=1e-6)


RAMP = np.arange(256, dtype=np.uint8)[::-1]


@pytest.mark.parametrize("segmented", ["", "Segmented"])
@pytest.mark.parametrize(
    ("first", "bits", "table", "highest"),
    [
        (0, 8, RAMP, 255),
        (1000, 8, RAMP, 255),  # indices of 16 bits before and beyond the table
        (1000, 8, RAMP[:255], 255),  # an odd number of bytes
        (0, 8, np.repeat(RAMP, 4), 255),  # more entries than 8 bits count
        (0, 8, RAMP.astype("<u2"), 255),  # 8 bits in cells of 16
        (0, 16, RAMP, 255),  # cells of 8 that are said to have 16
        (0, 16, RAMP.astype("<u2") * 17, 65535),
    ],
)
def test_palettes_of_every_kind_of_cell(
    tmp_path: Path, segmented: str, first: int, bits: int, table: np.ndarray, highest: int
) -> None:
    if segmented and (table.itemsize * 8 != bits or len(table) > 256):
        pytest.skip("a segment says its cells, and pydicom refuses more entries")
    indices = np.arange(1400, dtype=np.uint16).reshape(28, 50)
    ds = image_object(indices, bits=16, SOPClassUID=UltrasoundImageStorage, PhotometricInterpretation="PALETTE COLOR")
    halves = [
        [0, len(half), *half.tolist()] for half in np.array_split(table, 2)
    ]  # a segment of 8 bits has 255 at most
    content = np.concatenate(halves).astype(table.dtype) if segmented else table
    for name in ("Red", "Green", "Blue"):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [len(table), first, bits])
        data = content.tobytes() + b"\0" * (content.nbytes % 2)
        ds.add_new(f"{segmented}{name}PaletteColorLookupTableData", "OW", data)
    shown = read_image(written(ds, tmp_path / "x"), preset="color")
    expected = table[np.clip(indices.astype(int) - first, 0, len(table) - 1)] / highest
    np.testing.assert_allclose(shown, [expected] * 3, atol=1e-6)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_frames_come_one_by_one(tmp_path: Path, syntax: UID) -> None:
    cells = np.stack([CELLS, CELLS[::-1], CELLS[:, ::-1]])
    ds = image_object(cells, syntax=syntax, SOPClassUID=UltrasoundMultiFrameImageStorage)
    path = written(ds, tmp_path / "x")
    np.testing.assert_allclose([frame[0] for frame in read_frames(path, "us")], cells / 4095, atol=1e-6)


def test_missing_and_surplus_frames(tmp_path: Path) -> None:
    frames = [bytes(frame) for frame in pydicom.encaps.generate_frames(
        image_object(CELLS, syntax=JPEGLSLossless).PixelData, number_of_frames=1)]  # fmt: skip
    ds = image_object(CELLS, syntax=JPEGLSLossless, SOPClassUID=UltrasoundMultiFrameImageStorage)
    ds.PixelData = encapsulate(frames * 2)
    ds.NumberOfFrames = 3
    with pytest.raises(UnreadableImage, match=r"damaged|fewer frames"):
        list(read_frames(written(ds, tmp_path / "x"), "us"))
    ds.PixelData = encapsulate(frames * 4)
    assert len(list(read_frames(written(ds, tmp_path / "y"), "us"))) == 3


def test_a_header_that_claims_8_gib_is_refused_at_once(tmp_path: Path) -> None:
    read_image(written(image_object(CELLS), tmp_path / "warm"))
    path = written(image_object(CELLS, Rows=65535, Columns=65535), tmp_path / "x")
    start = time.perf_counter()
    with pytest.raises(UnreadableImage, match="larger than"):
        read_image(path)
    assert time.perf_counter() - start < 0.1


def test_long_values_stay_on_disk_until_they_are_used(tmp_path: Path) -> None:
    ds = image_object(np.zeros((1024, 1024), np.uint16))
    ds.add_new(0x00091001, "OB", b"\1" * 2**22)
    opened = open_dicom(written(ds, tmp_path / "x"))
    assert opened.get_item("PixelData", keep_deferred=True).value is None
    assert opened.get_item(0x00091001, keep_deferred=True).value is None
    assert len(opened.PixelData) == 2**21


def test_a_deflated_bomb_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    ds = image_object(CELLS, syntax=DeflatedExplicitVRLittleEndian)
    whole = content_of(ds)
    plain = content_of(image_object(CELLS))
    start = plain.index(b"\x08\x00\x16\x00UI")  # the first element of the data set
    bomb = plain[start : -CELLS.nbytes - 4] + (2**28).to_bytes(4, "little") + bytes(2**28)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    path = tmp_path / "bomb"
    path.write_bytes(_meta(whole) + deflate.compress(bomb) + deflate.flush())
    assert path.stat().st_size < 2**19
    with pytest.raises(UnreadableImage, match="more pixel data"):
        read_image(path)
    path.write_bytes(whole[:-500])
    with pytest.raises(UnreadableImage, match="truncated"):
        read_image(path)


def _meta(content: bytes) -> bytes:
    """Preamble and file meta information, whose length stands in its first element (PS3.10 7.1)."""
    return content[: 144 + int.from_bytes(content[140:144], "little")]


def test_an_object_that_starts_with_its_file_meta_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content_of(image_object(CELLS, syntax=JPEGLSLossless))[132:])
    np.testing.assert_allclose(read_image(path)[0], picture(), atol=1e-3)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        read_image(tmp_path / "x")


def test_a_transfer_syntax_without_a_decoder(tmp_path: Path) -> None:
    content = content_of(image_object(CELLS, syntax=JPEGLSLossless))
    for syntax in (b"1.2.840.10008.1.2.4.53", b"1.2.840.10008.1.2.8.12", b"1.2.840.113619.5.2.777"):
        (tmp_path / "x").write_bytes(content.replace(b"1.2.840.10008.1.2.4.80", syntax))
        with pytest.raises(UnreadableImage, match="no decoder"):
            read_image(tmp_path / "x")
    assert decoders_of(UID("1.2.840.10008.1.2.4.53")) == []
    assert decoders_of(JPEGLSLossless)[0] == "pyjpegls"
    assert decoders_of(JPEG2000Lossless)[0] == "pylibjpeg"
    assert "pylibjpeg" not in decoders_of(JPEGExtended12Bit, gpl=False)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_a_file_cut_anywhere_is_unreadable_or_whole(tmp_path: Path, syntax: UID) -> None:
    whole = content_of(image_object(CELLS, syntax=syntax))
    path = tmp_path / "cut.dcm"
    for share in (0.01, 0.03, 0.05, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        assert "cut" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_a_header_is_read_without_a_log_or_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    content = content_of(image_object(CELLS, WindowCenter=1, WindowWidth="12.5"))
    assert content.count(b"12.5") == 1
    path = tmp_path / "x"
    path.write_bytes(content.replace(b"12.5", b"Name"))
    with caplog.at_level(0), pytest.raises(UnreadableImage, match="cannot be decoded") as caught:
        read_image(path)
    assert "Name" not in str(caught.value)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
