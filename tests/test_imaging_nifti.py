"""NIfTI in and out: geometry as nibabel has it, values exact, and no header is believed before it is checked."""

import csv
import gzip
import tempfile
import tracemalloc
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes import read_mask_volume, read_volume
from fedmed.imaging.volumes.nifti import read_nifti, write_nifti
from fedmed.imaging.volumes.volume import Volume, canonical

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
REVERSED = np.eye(4)[[2, 1, 0, 3]]
SHAPE = (4, 5, 6)
AFFINE = np.array([[0.1, -0.2, 1.25, -37.5], [0.3, -1.5, 0.1, 12.0], [3.0, 0.2, -0.1, 101.0], [0, 0, 0, 1]])
VALUES = np.random.default_rng(0).normal(0, 300, SHAPE).astype(np.float32)


def save(path: Path, array: np.ndarray, affine: np.ndarray = REVERSED, **header: object) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def forge(path: Path, offset: int, content: bytes) -> Path:
    """Overwrite some bytes of the header."""
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_what_was_written_comes_back_exactly(tmp_path: Path, version: int, name: str):
    affine = AFFINE.astype(np.float32).astype(np.float64) if version == 1 else AFFINE
    write_nifti(Volume(values=VALUES, affine=affine), tmp_path / name, version=version)
    back = read_volume(tmp_path / name)
    assert (back.values == VALUES).all() and back.values.dtype == np.float32
    assert (back.affine == affine).all() and back.padding is None
    theirs = nibabel.load(tmp_path / name)
    assert (theirs.get_fdata().transpose(2, 1, 0) == VALUES).all() and (theirs.affine == affine @ REVERSED).all()


def test_only_a_grid_without_shear_has_a_qform(tmp_path: Path):
    rotated = np.eye(4)
    rotated[:3, :3] = np.array([[0.8, -0.36, 0.48], [0.6, 0.48, -0.64], [0, 0.8, 0.6]]) * [3, 1.5, 1.25]
    for affine, code in ((rotated, 1), (AFFINE, 0)):
        write_nifti(Volume(values=VALUES, affine=affine), tmp_path / "v.nii")
        header = nibabel.load(tmp_path / "v.nii").header
        assert int(header["qform_code"]) == code and int(header["sform_code"]) == 1
        assert header.get_zooms() == pytest.approx(np.linalg.norm(affine[:3, 2::-1], axis=0))
        if code:
            np.testing.assert_allclose(header.get_qform(), affine @ REVERSED, atol=1e-5)


def test_version_1_keeps_a_dicom_affine_to_a_tenth_of_a_micrometre(tmp_path: Path):
    write_nifti(Volume(values=VALUES, affine=AFFINE), tmp_path / "v.nii")
    assert np.abs(read_nifti(tmp_path / "v.nii").affine - AFFINE).max() < 1e-5


@given(st.sampled_from([0, 1, 255, 256, -1, 40000, 2**31 - 1]), st.booleans())
@settings(max_examples=14, deadline=None)
def test_labels_come_back_exactly_in_a_small_type(highest: int, zipped: bool):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("l.nii.gz" if zipped else "l.nii")
        labels = np.zeros(SHAPE, np.int64)
        labels[1, 2, 3] = highest
        write_nifti(Volume(values=labels, affine=np.eye(4)), path)
        back = read_nifti(path, labels=True)
        assert (back.values == labels).all() and back.values.dtype == np.int64
        assert nibabel.load(path).get_data_dtype().itemsize <= 4


@pytest.mark.parametrize("codes", ["".join(c) for p in product("LR", "AP", "IS") for c in permutations(p)])
def test_every_orientation_code_gives_the_same_canonical_volume(tmp_path: Path, codes: str):
    upright = nibabel.Nifti1Image(VALUES.transpose(2, 1, 0), np.diag([1.25, 1.5, 3.0, 1.0]))
    change = nibabel.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    image = upright.as_reoriented(change)
    assert np.allclose(image.affine, upright.affine @ inv_ornt_aff(change, upright.shape))
    nibabel.save(image, tmp_path / "v.nii")
    stored = read_nifti(tmp_path / "v.nii")
    assert (stored.affine == image.affine @ REVERSED).all()
    volume = canonical(stored)
    assert (volume.values == VALUES).all()
    np.testing.assert_allclose(volume.affine, upright.affine @ REVERSED, atol=1e-6)
    assert volume.spacing_mm == pytest.approx((3.0, 1.5, 1.25))


def test_slope_and_intercept_are_applied_and_nan_is_padding(tmp_path: Path):
    stored = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    path = save(tmp_path / "v.nii", stored)
    forge(path, 112, np.array([0.5, -10], "<f4").tobytes())
    volume = read_nifti(path)
    assert (volume.values == stored.transpose(2, 1, 0) * 0.5 - 10).all()
    assert (volume.values == nibabel.load(path).get_fdata().transpose(2, 1, 0)).all()
    holes = VALUES.copy()
    holes[0] = np.nan
    volume = read_nifti(save(tmp_path / "n.nii", holes.transpose(2, 1, 0)))
    assert volume.padding is not None and volume.padding[0].all() and not volume.padding[1:].any()
    assert (volume.values[0] == VALUES[1:].min()).all() and (volume.values[1:] == VALUES[1:]).all()


def test_sform_goes_before_qform_and_either_before_none(tmp_path: Path):
    image = nibabel.Nifti1Image(VALUES.transpose(2, 1, 0), None)
    image.header.set_zooms((1.25, 1.5, 3.0))
    for sform, qform in ((1, 1), (0, 1), (1, 0), (0, 0)):
        image.set_qform(np.diag([-1.25, -1.5, 3, 1]), code=qform, strip_shears=False)
        image.set_sform(np.diag([1.25, -1.5, 3, 1]), code=sform)
        nibabel.save(image, tmp_path / "v.nii")
        theirs = nibabel.load(tmp_path / "v.nii").affine
        np.testing.assert_allclose(read_nifti(tmp_path / "v.nii").affine, theirs @ REVERSED, atol=1e-6)


def test_byte_orders_number_types_and_a_trailing_axis_of_one_are_read(tmp_path: Path):
    for kind in ("u1", "i1", "<i2", ">i2", ">u2", "<i4", ">f4", "<f8", "<i8"):
        array = np.clip(np.rint(VALUES.transpose(2, 1, 0)), 0, 100).astype(kind)
        image = nibabel.Nifti1Image(
            array[..., None], np.eye(4), nibabel.Nifti1Header(endianness=kind[0].replace("u", "<").replace("i", "<"))
        )
        image.set_data_dtype(array.dtype)
        nibabel.save(image, tmp_path / "v.nii")
        assert (read_nifti(tmp_path / "v.nii").values == array.transpose(2, 1, 0)).all(), kind


DIM, DATATYPE, OFFSET, SLOPE, MAGIC, SROW = 40, 70, 108, 112, 344, 280


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"\0\0\0\0", "not NIfTI"),
        (MAGIC, b"ni1\0", "not a single-file NIfTI"),
        (DIM, np.array([3, 30000, 30000, 3000], "<i2").tobytes(), "million voxels"),
        (DIM, np.array([3, 2000, 2000, 100], "<i2").tobytes(), "truncated NIfTI"),
        (DIM, np.array([3, -6, 5, 4], "<i2").tobytes(), "impossible dimensions"),
        (DIM, np.array([9, 6, 5, 4], "<i2").tobytes(), "impossible dimensions"),
        (DIM, np.array([2, 6, 5, 4], "<i2").tobytes(), "two dimensions"),
        (DIM, np.array([4, 6, 5, 2, 2], "<i2").tobytes(), "several volumes"),
        (DATATYPE, np.array([128, 24], "<i2").tobytes(), "colours, complex or unusual"),
        (DATATYPE, np.array([32, 64], "<i2").tobytes(), "colours, complex or unusual"),
        (DATATYPE, np.array([9999, 8], "<i2").tobytes(), "colours, complex or unusual"),
        (OFFSET, np.array([1e9], "<f4").tobytes(), "impossible vox_offset"),
        (OFFSET, np.array([np.nan], "<f4").tobytes(), "impossible vox_offset|cannot be decoded"),
        (SLOPE, np.array([1, np.inf], "<f4").tobytes(), "impossible scl_inter"),
        (SROW, np.array([np.nan], "<f4").tobytes(), "no usable affine"),
        (SROW, np.zeros(12, "<f4").tobytes(), "squashes"),
    ],
)
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_a_forged_header_is_refused_before_memory_is_spent(
    tmp_path: Path, name: str, offset: int, content: bytes, reason: str
):
    path = forge(save(tmp_path / name, VALUES.transpose(2, 1, 0)), offset, content)
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage, match=reason) as refusal:
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_every_truncation_is_one_clean_error(tmp_path: Path, name: str):
    whole = save(tmp_path / name, VALUES.transpose(2, 1, 0)).read_bytes()
    for length in {0, 1, 2, 3, 40, *range(100, len(whole), 29), len(whole) - 12}:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UnreadableImage, match="truncated" if length > 600 else "truncated|not NIfTI"):
            read_nifti(tmp_path / name)


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path):
    path = save(tmp_path / "v.nii", VALUES.transpose(2, 1, 0))
    forge(path, DIM, np.array([3, 6, 5, 4], "<i2").tobytes())
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(path.read_bytes() + bytes(2**26), 1))
    tracemalloc.start()
    try:
        assert (read_nifti(tmp_path / "v.nii.gz").values == VALUES).all()
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_refuses_infinite_values_fractional_labels_and_labels_above_32_bits(tmp_path: Path):
    infinite = VALUES.copy()
    infinite[0, 0, 0] = np.inf
    with pytest.raises(UnreadableImage, match="not numbers"):
        read_nifti(save(tmp_path / "i.nii", infinite.transpose(2, 1, 0)))
    with pytest.raises(UnreadableImage, match="no whole numbers"):
        read_nifti(save(tmp_path / "f.nii", VALUES.transpose(2, 1, 0)), labels=True)
    with pytest.raises(UnreadableImage, match="32 bits"):
        write_nifti(Volume(values=np.full(SHAPE, 2**40), affine=np.eye(4)), tmp_path / "w.nii")


def rows() -> list[dict[str, str]]:
    path = DATA / "vol3d" / "dev" / "metadata.csv"
    if not path.is_file():
        return [{"image": "none", "task": "none"}]
    with path.open() as file:
        found = list(csv.DictReader(file))
    return [row for number, row in enumerate(found) if row["task"] != "msd_hippocampus" or number % 6 == 0]


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize("row", rows(), ids=lambda row: Path(row["image"]).name)
def test_real_volumes_have_nibabels_geometry_and_their_masks_fit(row: dict[str, str]):
    path = DATA / "vol3d" / row["image"]
    files = sorted(file for file in path.iterdir() if file.name != "label.nii.gz") if path.is_dir() else [path]
    for file in files:
        volume, theirs = read_volume(file), nibabel.load(file)
        assert "x".join(map(str, volume.shape[::-1])) == row["shape"]
        np.testing.assert_allclose(
            volume.spacing_mm[::-1], [float(part) for part in row["spacing"].split("x")], atol=1e-3
        )
        ours, closest = canonical(volume), nibabel.as_closest_canonical(theirs)
        assert (ours.values == closest.get_fdata(dtype=np.float32).transpose(2, 1, 0)).all()
        np.testing.assert_allclose(ours.affine, closest.affine @ REVERSED, atol=1e-5)
        mask = read_mask_volume(DATA / "vol3d" / row["label"], volume)
        counts = {f"{label}:{count}" for label, count in zip(*np.unique(mask, return_counts=True), strict=True)}
        assert counts == set(row["labels"].split())
