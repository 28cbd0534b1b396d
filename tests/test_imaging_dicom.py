"""The grey pipeline: against pydicom, against arithmetic by hand, and the same picture from many scanners."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom import grey as dicom
from fedmed.imaging.dicom.pixels import significant_bits
from fedmed.imaging.reading import read_image

SHAPE = (96, 80)
SECRET = "Secret-Patient-4711"


def picture(shape: tuple[int, int] = SHAPE) -> NDArray[np.float64]:
    """Smooth, with all greys from 0 to 1."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] / np.array(shape)[:, None, None]
    values = np.sin(5 * x + y) + np.cos(4 * y)
    return (values - values.min()) / np.ptp(values)


def image_object(cells: NDArray[Any], *, bits: int = 12, syntax: UID = ExplicitVRLittleEndian, **tags: Any) -> Dataset:
    """A DX object around these stored values; `tags` are keywords, None removes one."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3.4711"
    ds.PatientID, ds.PatientName = SECRET, SECRET
    ds.Rows, ds.Columns = cells.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = cells.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(cells.dtype.kind == "i")
    ds.PixelData = cells.tobytes()
    if syntax.is_encapsulated:
        ds.compress(syntax, generate_instance_uid=False)
    else:
        ds.file_meta.TransferSyntaxUID = syntax
    for keyword, value in tags.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def written(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True, overwrite=True)
    return path


def lut_item(table: NDArray[Any], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(table) % 2**16, first, bits])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    return item


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


@settings(max_examples=60, deadline=None)
@given(
    centre=st.floats(-2000, 5000),
    width=st.floats(1.5, 6000),
    name=st.sampled_from(sorted(dicom.WINDOWS)),
    slope=st.sampled_from([1.0, 0.25, 3.0]),
    intercept=st.sampled_from([0.0, -1000.0]),
)
def test_windows_agree_with_pydicom(centre: float, width: float, name: str, slope: float, intercept: float) -> None:
    cells = np.rint(picture() * 4095).astype(np.uint16)
    ds = image_object(cells, WindowCenter=round(centre, 3), WindowWidth=round(width, 3), VOILUTFunction=name,
                      RescaleSlope=slope, RescaleIntercept=intercept)  # fmt: skip
    values = apply_modality_lut(cells, ds)
    low, high = intercept, 4095 * slope + intercept  # pydicom's output range
    with np.errstate(over="ignore"):  # pydicom's sigmoid far from the window
        expected = (apply_voi_lut(values, ds) - low) / (high - low)
    np.testing.assert_allclose(dicom.modality_values(ds, cells), values, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(dicom.displayed(ds), expected, atol=1e-3)


def test_luts_agree_with_pydicom() -> None:
    cells = np.rint(picture() * 4095).astype(np.uint16)
    table = np.rint(65535 * np.linspace(0, 1, 1024) ** 2).astype(np.uint16)
    modality = image_object(cells, ModalityLUTSequence=[lut_item(table, 700, 16)])
    np.testing.assert_array_equal(dicom.modality_values(modality, cells), apply_modality_lut(cells, modality))
    voi = image_object(cells, VOILUTSequence=[lut_item(table, 700, 16)], WindowCenter=1, WindowWidth=2)
    np.testing.assert_allclose(dicom.displayed(voi), apply_voi_lut(cells, voi) / 65535, atol=1e-6)


def test_lut_with_more_entries_than_its_8_bits_count() -> None:
    item = lut_item(np.arange(4096) // 16, 0, 8)
    values = np.array([-5, 0, 255, 256, 4095, 9999])
    np.testing.assert_array_equal(dicom.look_up(item, values), [0, 0, 15, 16, 255, 255])


def test_lut_of_65536_entries_and_negative_start() -> None:
    item = lut_item(np.arange(65536), -32768, 16)
    np.testing.assert_array_equal(dicom.look_up(item, np.array([-32768.0, 0.4, 32767])), [0, 32768, 65535])


def test_window_edges_by_hand() -> None:
    values = np.array([1, 2, 3, 4, 5, 6], np.float32)
    np.testing.assert_allclose(dicom.linear(values, 4, 3), [0, 0, 0.25, 0.75, 1, 1])  # edges 2.5 and 4.5
    np.testing.assert_allclose(dicom.linear(values, 4, 1), [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(dicom.linear_exact(values, 4, 4), [0, 0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(dicom.sigmoid(values, 4, 4)[3:5], [0.5, 1 / (1 + np.exp(-1))], rtol=1e-6)


@pytest.mark.parametrize("shape", [None, "INVERSE", "IDENTITY"])
def test_monochrome1_is_inverted_once(shape: str | None) -> None:
    cells = np.rint(picture() * 4095).astype(np.uint16)
    tags = {} if shape is None else {"PresentationLUTShape": shape}
    ds = image_object(cells, PhotometricInterpretation="MONOCHROME1", **tags)
    np.testing.assert_allclose(dicom.displayed(ds), 1 - picture(), atol=1e-3)


def test_inverse_presentation_lut_alone_inverts() -> None:
    cells = np.rint(picture() * 4095).astype(np.uint16)
    np.testing.assert_allclose(
        dicom.displayed(image_object(cells, PresentationLUTShape="INVERSE")), 1 - picture(), atol=1e-3
    )


def test_inversion_can_be_switched_off_to_show_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = np.rint(picture() * 4095).astype(np.uint16)
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
    shown = dicom.displayed(ds)
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
    assert dicom.padding_mask(ds, cells).sum() == 8


def test_a_picture_of_padding_alone_is_shown_as_pixels() -> None:
    ds = image_object(np.zeros((4, 4), np.uint16), PixelPaddingValue=0)
    assert not dicom.displayed(ds).any()


def test_bits_above_and_below_the_stored_ones_are_dropped() -> None:
    cells = np.array([0b1111_0000_0000_0101, 0b0101_1000_0000_0000], np.uint16)
    np.testing.assert_array_equal(significant_bits(cells, stored=12, high=11), [5, 2048])
    np.testing.assert_array_equal(significant_bits(cells.view(np.int16), stored=12, high=11), [5, -2048])
    np.testing.assert_array_equal(significant_bits(np.array([0xABC7], np.uint16), stored=12, high=15), [0xABC])


def test_overlay_in_unused_bits_does_not_show(tmp_path: Path) -> None:
    cells = np.rint(picture() * 4095).astype(np.uint16) | np.uint16(0x8000)
    shown = read_image(written(image_object(cells), tmp_path / "x"))
    np.testing.assert_allclose(shown[0], picture(), atol=1e-3)


def test_flat_picture_is_black_not_nan() -> None:
    assert not dicom.displayed(image_object(np.full((4, 4), 7, np.uint16))).any()


def color_tags() -> dict[str, Any]:
    return {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelData": None}, "no pixels"),
        ({"Rows": None}, "header lacks Rows"),
        ({"BitsStored": None}, "header lacks BitsStored"),
        ({"Rows": 0}, "no rows or columns"),
        ({"Rows": 97}, "truncated pixels"),
        ({"Rows": 65535, "Columns": 65535}, "larger than 512 MiB"),
        ({"NumberOfFrames": 2}, "multi-frame"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}, "colour image"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "not a grey image"),
        ({"BitsStored": 17, "HighBit": 16}, "impossible bit depth"),
        ({"HighBit": 3}, "impossible bit depth"),
        ({"PixelRepresentation": 7}, "impossible pixel representation"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "rescale slope is zero"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "impossible window width"),
        ({"WindowCenter": 1, "WindowWidth": 10, "VOILUTFunction": "CUBIC"}, "unknown VOI LUT function"),
        ({"SOPClassUID": DigitalXRayImageStorageForProcessing}, "for processing"),
    ],
)
def test_refuses_with_a_reason_and_without_a_name(tmp_path: Path, tags: dict[str, Any], reason: str) -> None:
    ds = image_object(np.rint(picture() * 4095).astype(np.uint16), **tags)
    path = written(ds, tmp_path / f"{SECRET}.dcm")
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(path)
    assert SECRET not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_short_lookup_table_is_refused() -> None:
    item = lut_item(np.arange(16), 0, 16)
    item.LUTDescriptor = [1024, 0, 16]
    with pytest.raises(UnreadableImage, match="lookup table"):
        dicom.look_up(item, np.zeros((2, 2)))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_a_file_cut_anywhere_is_unreadable_or_whole(tmp_path: Path, syntax: UID) -> None:
    buffer = io.BytesIO()
    image_object(np.rint(picture() * 4095).astype(np.uint16), syntax=syntax).save_as(buffer, enforce_file_format=True)
    whole = buffer.getvalue()
    for share in (0.01, 0.03, 0.05, 0.1, 0.5, 0.9):
        path = tmp_path / "cut.dcm"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        assert "cut" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    image_object(np.rint(picture() * 4095).astype(np.uint16), WindowCenter=2048, WindowWidth=4096).save_as(
        buffer, enforce_file_format=True
    )
    rng, path = np.random.default_rng(0), tmp_path / "x"
    head = len(buffer.getvalue()) - 2 * SHAPE[0] * SHAPE[1]
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        for place in rng.integers(132, head, 4):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            shown = read_image(path)
        except UnreadableImage as error:
            assert SECRET not in str(error)  # noqa: PT017 - damage may or may not be seen
        else:
            assert shown.ndim == 3
            assert shown.min() >= 0
            assert shown.max() <= 1


def test_colour_dicom_under_color(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    ds = image_object(rgb[..., 0], bits=8, **color_tags())
    ds.PixelData = rgb.tobytes() if rgb.size % 2 == 0 else rgb.tobytes() + b"\0"
    path = written(ds, tmp_path / "x")
    np.testing.assert_allclose(read_image(path, preset="color"), rgb.transpose(2, 0, 1) / 255, atol=1e-6)
    grey = written(image_object(rgb[..., 0], bits=8), tmp_path / "y")
    assert read_image(grey, preset="color").shape == (3, 8, 9)
    assert pydicom.dcmread(path).SamplesPerPixel == 3
