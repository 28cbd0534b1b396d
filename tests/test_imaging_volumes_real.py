"""Real series of several scanners: right, or refused with the reason."""

import csv
from pathlib import Path

import numpy as np
import pytest
from test_imaging_series import assert_agrees_with_highdicom

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes import read_volume
from fedmed.imaging.volumes.series import read_series

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "dicom" / "dev"
REAL = {  # facts of the sets: names without order, spacing 6.5 mm where the header says 5, time points not told apart
    "ct_philips_phantom_std": ((28, 512, 512), (5.0, 0.451171875, 0.451171875)),
    "mr_siemens_t1post_pgbm003": ((22, 320, 280), (6.5, 0.6875, 0.6875)),
    "mr_hippocrop_pgbm003": ((40, 50, 34), (1.0, 1.0, 1.0)),
    "torchio_tests": ((17, 128, 88), (2.0, 2.0, 2.0)),
    "mr_ge_epi_interleaved_timeseries": "149 slices at 15 positions",
}


def real_series() -> list[Path]:
    folder = DATA / "series"
    return sorted(folder.iterdir()) if folder.is_dir() else [Path("none")]


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize("folder", real_series(), ids=lambda folder: folder.name)
def test_real_series_are_right_or_refused(folder: Path):
    expected = REAL[folder.name]
    if isinstance(expected, str):
        with pytest.raises(UnreadableImage, match=expected):
            read_series(folder)
        return
    volume = read_series(folder)
    shape, spacing = expected
    assert volume.shape == shape
    np.testing.assert_allclose(volume.spacing_mm, spacing, atol=1e-4)
    with (DATA / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if f"/{folder.name}/" in row["path"] and row["vmax"]]
    slopes = {(float(row["RescaleSlope"] or 1), float(row["RescaleIntercept"] or 0)) for row in rows}
    ((slope, intercept),) = slopes
    assert volume.values.max() == pytest.approx(max(float(row["vmax"]) for row in rows) * slope + intercept)
    assert_agrees_with_highdicom(volume, folder)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hd/ct_image.dcm", "a single slice"),
        ("pydata/emri_small.dcm", "without a functional group"),
        ("dcm4che/NM-MONO2-16-13x-heart.dcm", "frames of a cine or of another kind"),
        ("hd/sm_image.dcm", "frames of a cine or of another kind"),
        ("dcmqi/sr.dcm", "not a volume"),
        ("rtutils/rt.dcm", "not a volume"),
    ],
)
def test_real_objects_that_are_no_volume_are_refused(name: str, reason: str):
    with pytest.raises(UnreadableImage, match=reason):
        read_volume(DATA / "files" / name)
