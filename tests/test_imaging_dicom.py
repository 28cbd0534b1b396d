"""The grey pipeline: against pydicom, against arithmetic by hand, and the same picture from many scanners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import SHAPE, cells_of, image_object, item_of, lut_item, picture, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.pixels import apply_modality_lut, apply_presentation_lut, apply_voi_lut
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom import grey as dicom
from fedmed.imaging.dicom.frames import frame_values
from fedmed.imaging.dicom.modality import look_up, modality_values, padding_mask
from fedmed.imaging.dicom.pixels import significant_bits
from fedmed.imaging.reading import read_frames, read_image


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless,
     JPEGLSLossless],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_reads_every_lossless_syntax_alike(tmp_path: Path, syntax: UID, dtype: type) -> None:
    cells = np.rint(picture() * 4095 - (2048 if dtype is np.int16 else 0)).astype(dtype)
    shown = read_image(written(image_object(cells, syntax=syntax), tmp_path / "x"))
    assert shown.shape == (1, *SHAPE)
    assert shown.dtype == np.float32
    np.testing.assert_allclose(shown[0], picture(), atol=1 / 4095)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([8, 10, 12, 14, 16]),
    signed=st.booleans(),
    inverted=st.booleans(),
    says=st.booleans(),
    slope=st.sampled_from([1.0, 0.5, 2.0, 0.123]),
    intercept=st.sampled_from([0.0, -1024.0, 17.5]),
    display=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", None]),
)
def test_one_picture_from_many_scanners(
    tmp_path: Path, bits: int, signed: bool, inverted: bool, says: bool, slope: float, intercept: float,
    display: str | None,
) -> None:  # fmt: skip
    lowest = -(2 ** (bits - 1)) if signed else 0
    highest = lowest + 2**bits - 1
    centre, width = (lowest + highest) / 2 * slope + intercept, 0.8 * (highest - lowest) * slope
    wanted = 0.1 + 0.8 * picture() if display else picture()
    y = 1 - wanted if inverted else wanted
    values = {
        "LINEAR": (y - 0.5) * (width - 1) + centre - 0.5,
        "LINEAR_EXACT": (y - 0.5) * width + centre,
        "SIGMOID": centre - width / 4 * np.log(1 / np.clip(y, 1e-9, 1 - 1e-9) - 1),
        None: (y - 0.5) * (highest - lowest) * slope + centre,
    }[display]
    cells = np.rint((values - intercept) / slope).astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    tags: dict[str, Any] = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    if display:
        tags |= {"WindowCenter": [centre, 1.0], "WindowWidth": [width, 2.0], "VOILUTFunction": display}
    if inverted:
        tags["PhotometricInterpretation"] = "MONOCHROME1"
    if says:
        tags["PresentationLUTShape"] = "INVERSE" if inverted else "IDENTITY"
    shown = read_image(written(image_object(cells, bits=bits, **tags), tmp_path / "x"))[0]
    np.testing.assert_allclose(shown, wanted, atol=2 / (0.8 * (2**bits - 1)) + 1e-3)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from([8, 10, 12, 15, 16]),
    signed=st.booleans(),
    centre=st.floats(-1, 1),
    width=st.floats(0.01, 2),
    name=st.sampled_from(sorted(dicom.WINDOWS)),
    slope=st.sampled_from([1.0, 0.25, 3.0]),
    intercept=st.sampled_from([0.0, -1000.0]),
)
def test_windows_agree_with_pydicom(
    bits: int, signed: bool, centre: float, width: float, name: str, slope: float, intercept: float
) -> None:
    lowest, span = (-(2 ** (bits - 1)) if signed else 0), 2**bits - 1
    cells = np.rint(picture() * span + lowest).astype(np.int16 if signed else np.uint16)
    middle = (lowest + (0.5 + centre / 2) * span) * slope + intercept
    ds = image_object(cells, bits=bits, WindowCenter=round(middle, 3), WindowWidth=round(1 + width * span * slope, 3),
                      VOILUTFunction=name, RescaleSlope=slope, RescaleIntercept=intercept)  # fmt: skip
    values = apply_modality_lut(cells, ds)
    low, high = lowest * slope + intercept, (lowest + span) * slope + intercept  # pydicom's output range
    with np.errstate(over="ignore"):  # pydicom's sigmoid far from the window
        expected = (apply_voi_lut(values, ds) - low) / (high - low)
    np.testing.assert_allclose(modality_values(ds, cells), values, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(next(dicom.displayed_frames(ds)), expected, atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from(["IDENTITY", "INVERSE"]), bits=st.sampled_from([8, 12, 16]), signed=st.booleans())
def test_presentation_lut_shapes_agree_with_pydicom(shape: str, bits: int, signed: bool) -> None:
    lowest, span = (-(2 ** (bits - 1)) if signed else 0), 2**bits - 1
    cells = np.rint(picture() * span + lowest).astype(np.int16 if signed else np.uint16)
    ds = image_object(cells, bits=bits, PresentationLUTShape=shape)
    expected = apply_presentation_lut(cells.astype(np.int32), ds)
    np.testing.assert_allclose(
        next(dicom.displayed_frames(ds)), (expected - expected.min()) / np.ptp(expected), atol=1e-5
    )


def test_luts_agree_with_pydicom() -> None:
    cells = cells_of(picture())
    table = np.rint(65535 * np.linspace(0, 1, 1024) ** 2).astype(np.uint16)
    modality = image_object(cells, ModalityLUTSequence=[lut_item(table, 700, 16)])
    np.testing.assert_array_equal(modality_values(modality, cells), apply_modality_lut(cells, modality))
    voi = image_object(cells, VOILUTSequence=[lut_item(table, 700, 16)], WindowCenter=1, WindowWidth=2)
    np.testing.assert_allclose(next(dicom.displayed_frames(voi)), apply_voi_lut(cells, voi) / 65535, atol=1e-6)


def test_lut_with_more_entries_than_its_8_bits_count() -> None:
    item = lut_item(np.arange(4096) // 16, 0, 8)
    values = np.array([-5, 0, 255, 256, 4095, 9999])
    np.testing.assert_array_equal(look_up(item, values), [0, 0, 15, 16, 255, 255])


def test_lut_of_65536_entries_and_negative_start() -> None:
    item = lut_item(np.arange(65536), -32768, 16)
    np.testing.assert_array_equal(look_up(item, np.array([-32768.0, 0.4, 32767])), [0, 32768, 65535])


def test_window_edges_by_hand() -> None:
    values = np.array([1, 2, 3, 4, 5, 6], np.float32)
    np.testing.assert_allclose(dicom.linear_(values.copy(), 4, 3), [0, 0, 0.25, 0.75, 1, 1])  # edges 2.5 and 4.5
    np.testing.assert_allclose(dicom.linear_(values.copy(), 4, 1), [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(dicom.linear_exact_(values.copy(), 4, 4), [0, 0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(dicom.sigmoid_(values.copy(), 4, 4)[3:5], [0.5, 1 / (1 + np.exp(-1))], rtol=1e-6)


@pytest.mark.parametrize(("centre", "width"), [(5, 0), (5, -3), (0, [0, 4000]), (float("nan"), 4000)])
@pytest.mark.parametrize("name", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_an_impossible_window_is_as_none(centre: float, width: float, name: str) -> None:
    plain = next(dicom.displayed_frames(image_object(cells_of(picture()))))
    ds = image_object(cells_of(picture()))
    ds.add_new("WindowCenter", "DS", centre), ds.add_new("WindowWidth", "DS", width)
    ds.VOILUTFunction = name
    np.testing.assert_array_equal(next(dicom.displayed_frames(ds)), plain)


def test_a_linear_window_narrower_than_one_is_exact() -> None:
    cells = cells_of(picture())
    shown = next(dicom.displayed_frames(image_object(cells, RescaleSlope=1 / 4095, WindowCenter=0.5, WindowWidth=0.5)))
    np.testing.assert_allclose(shown, np.clip((cells / 4095 - 0.25) * 2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("shape", [None, "INVERSE", "IDENTITY"])
def test_monochrome1_is_inverted_once(shape: str | None) -> None:
    cells = cells_of(picture())
    tags = {} if shape is None else {"PresentationLUTShape": shape}
    ds = image_object(cells, PhotometricInterpretation="MONOCHROME1", **tags)
    np.testing.assert_allclose(next(dicom.displayed_frames(ds)), 1 - picture(), atol=1e-3)


def test_inverse_presentation_lut_alone_inverts() -> None:
    cells = cells_of(picture())
    np.testing.assert_allclose(
        next(dicom.displayed_frames(image_object(cells, PresentationLUTShape="INVERSE"))), 1 - picture(), atol=1e-3
    )


def test_inversion_can_be_switched_off_to_show_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of(picture())
    path = written(image_object(cells, PhotometricInterpretation="MONOCHROME1"), tmp_path / "x")
    right = read_image(path)
    monkeypatch.setattr(dicom, "invert", lambda values: values)
    np.testing.assert_allclose(read_image(path), 1 - right, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_left_out_of_the_range(photometric: str) -> None:
    cells = np.rint(1000 + picture() * 100).astype(np.int16)
    cells[:, :5], cells[:, -5:] = -2000, -1990
    ds = image_object(cells, bits=16, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990,
                      PhotometricInterpretation=photometric, RescaleSlope=2, RescaleIntercept=-50)  # fmt: skip
    shown = next(dicom.displayed_frames(ds))
    inside = shown[:, 5:-5]
    assert not shown[:, :5].any()
    assert not shown[:, -5:].any()
    assert inside.min() == 0
    assert inside.max() == 1
    plain = picture()[:, 5:-5]
    plain = (plain - plain.min()) / np.ptp(plain)
    np.testing.assert_allclose(inside, plain if photometric == "MONOCHROME2" else 1 - plain, atol=0.02)


def test_padding_written_with_the_other_sign_is_recognised() -> None:
    cells = np.full((4, 4), -2000, np.int16)
    cells[1:3] = [1, 2, 3, 4]
    ds = image_object(cells, bits=16)
    ds.add_new("PixelPaddingValue", "US", 63536)
    assert padding_mask(ds, cells).sum() == 8


def test_a_picture_of_padding_alone_is_shown_as_pixels() -> None:
    ds = image_object(np.zeros((4, 4), np.uint16), PixelPaddingValue=0)
    assert not next(dicom.displayed_frames(ds)).any()


def test_bits_above_and_below_the_stored_ones_are_dropped() -> None:
    cells = np.array([0b1111_0000_0000_0101, 0b0101_1000_0000_0000], np.uint16)
    np.testing.assert_array_equal(significant_bits(cells, stored=12, high=11), [5, 2048])
    np.testing.assert_array_equal(significant_bits(cells.view(np.int16), stored=12, high=11), [5, -2048])
    np.testing.assert_array_equal(significant_bits(np.array([0xABC7], np.uint16), stored=12, high=15), [0xABC])


def test_overlay_in_unused_bits_does_not_show(tmp_path: Path) -> None:
    cells = cells_of(picture()) | np.uint16(0x8000)
    shown = read_image(written(image_object(cells), tmp_path / "x"))
    np.testing.assert_allclose(shown[0], picture(), atol=1e-3)


def test_flat_picture_is_black_not_nan() -> None:
    assert not next(dicom.displayed_frames(image_object(np.full((4, 4), 7, np.uint16)))).any()


def test_short_lookup_table_is_refused() -> None:
    item = lut_item(np.arange(16), 0, 16)
    item.LUTDescriptor = [1024, 0, 16]
    with pytest.raises(UnreadableImage, match="lookup table"):
        look_up(item, np.zeros((2, 2)))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("signed", [False, True])
def test_values_at_the_top_of_their_cells_are_moved_down(tmp_path: Path, syntax: UID, signed: bool) -> None:
    values = np.rint(picture() * 4095 - 2048 * signed).astype(np.int16)
    cells = (values.astype(np.uint16) << 4 | 5).astype(np.int16 if signed else np.uint16)
    ds = image_object(cells, bits=16, syntax=syntax, BitsStored=12, HighBit=15)
    np.testing.assert_array_equal(next(frame_values(ds)).values, values)


def test_lookup_tables_of_big_endian_files() -> None:
    table = np.arange(1024, dtype=np.uint16) * 60
    for bits, data in ((16, table.astype(">u2").tobytes()), (8, (table >> 8).astype(np.uint8).reshape(-1, 2)[:, ::-1])):
        item = lut_item(table, 0, bits)
        item.LUTData = bytes(data) if isinstance(data, bytes) else data.tobytes()
        item.set_original_encoding(False, False)
        np.testing.assert_array_equal(look_up(item, np.arange(1024)), table if bits == 16 else table >> 8)


def test_big_endian_pixels(tmp_path: Path) -> None:
    cells = cells_of(picture())
    ds = image_object(cells, syntax=ExplicitVRBigEndian)
    ds.PixelData = cells.astype(">u2").tobytes()
    np.testing.assert_allclose(read_image(written(ds, tmp_path / "x"))[0], picture(), atol=1e-3)


def enhanced(**shared: Any) -> Any:
    """Three frames, each with its own slope (as PET and CT may have) and window."""
    cells = np.stack([cells_of(picture())] * 3)
    groups = [
        item_of(
            PixelValueTransformationSequence=[item_of(RescaleSlope=slope, RescaleIntercept=-5.0, RescaleType="US")],
            FrameVOILUTSequence=[item_of(WindowCenter=2048 * slope - 5, WindowWidth=4096 * slope)],
        )
        for slope in (1.0, 0.5, 2.0)
    ]
    return image_object(cells, SOPClassUID=EnhancedMRImageStorage, PerFrameFunctionalGroupsSequence=groups, **shared)


def test_every_frame_has_its_own_slope_and_window(tmp_path: Path) -> None:
    ds = enhanced(RescaleSlope=100, RescaleIntercept=7)  # not where an enhanced object says it
    frames = list(frame_values(ds))
    for frame, slope in zip(frames, (1.0, 0.5, 2.0), strict=True):
        np.testing.assert_allclose(frame.values, cells_of(picture()) * slope - 5, rtol=1e-6)
        assert not frame.padding.any()
    path = written(ds, tmp_path / "x")
    for shown in read_frames(path):
        np.testing.assert_allclose(shown[0], picture(), atol=1e-3)


def test_functional_groups_that_all_frames_share() -> None:
    group = item_of(PixelValueTransformationSequence=[item_of(RescaleSlope=3.0, RescaleIntercept=1.0)])
    ds = image_object(np.stack([cells_of(picture())] * 2), SOPClassUID=EnhancedMRImageStorage,
                      SharedFunctionalGroupsSequence=[group], PixelPaddingValue=0)  # fmt: skip
    for frame in frame_values(ds):
        np.testing.assert_allclose(frame.values, cells_of(picture()) * 3.0 + 1, rtol=1e-6)
        np.testing.assert_array_equal(frame.padding, cells_of(picture()) == 0)


def test_quantities_are_not_inverted_but_say_how_they_are_shown() -> None:
    ds = image_object(cells_of(picture()), SOPClassUID=CTImageStorage, PhotometricInterpretation="MONOCHROME1",
                      RescaleSlope=1, RescaleIntercept=-1024)  # fmt: skip
    frame = next(frame_values(ds))
    assert frame.lowest_is_white
    np.testing.assert_allclose(frame.values, cells_of(picture()) - 1024.0)
