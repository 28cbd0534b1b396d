"""A patient is known again in real files: under new pseudonyms, file names and transfer syntaxes."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from dicom_files import SHAPE, cells_of, image_object, picture, written
from image_sets import LABELS, REAL, load, site, volumes
from PIL import ExifTags, Image
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from records import step

from fedmed import config as run_file
from fedmed.errors import BudgetExhausted, UnreadableImage
from fedmed.imaging.fingerprints import fingerprints
from fedmed.training.oversight import Oversight, permitted
from fedmed.training.site import settings_for_sites, settings_from
from fedmed.training.site_cohort import cohort_of_patients, patients_of
from fedmed.types import Task, Weights


def dicom(path: Path, cells: np.ndarray, **facts: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return written(image_object(cells, **facts), path)


def table(manifest: Path) -> list[dict[str, str]]:
    with manifest.open() as file:
        return list(csv.DictReader(file))


def test_p12_a_new_export_of_a_picture_has_its_fingerprint(tmp_path):
    cells = cells_of(picture())
    first = fingerprints(dicom(tmp_path / "a.dcm", cells))
    assert first.shape == (1, 32)
    exports = [
        {"PatientID": "other", "SOPInstanceUID": "1.2.3.99", "WindowCenter": 5, "WindowWidth": 9},
        {"syntax": RLELossless},
        {"syntax": ImplicitVRLittleEndian},
        {"PhotometricInterpretation": "MONOCHROME1"},
    ]
    for number, facts in enumerate(exports):
        again = dicom(tmp_path / f"{number}.dcm", cells, **{"syntax": ExplicitVRLittleEndian, **facts})
        assert np.array_equal(fingerprints(again), first)
    cells = cells.copy()
    cells[3, 4] ^= 1
    assert not np.array_equal(fingerprints(dicom(tmp_path / "b.dcm", cells)), first)


def test_a_series_has_a_fingerprint_for_each_slice_so_that_a_part_of_it_is_known(tmp_path):
    rng = np.random.default_rng(1)
    slices = rng.integers(0, 4000, (4, *SHAPE), dtype=np.uint16)
    for number, cells in enumerate(slices):
        dicom(tmp_path / "series" / f"{number}.dcm", cells)
    whole = fingerprints(tmp_path / "series")
    assert len(whole) == 4
    assert np.array_equal(fingerprints(dicom(tmp_path / "frames.dcm", slices)), whole)
    assert {bytes(row) for row in fingerprints(dicom(tmp_path / "one.dcm", slices[2]))} < {bytes(row) for row in whole}


def test_p12_a_photograph_has_its_fingerprint_without_its_exif_data_too(tmp_path):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name, exif in (("a", turned), ("b", Image.Exif())):
        Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(tmp_path / f"{name}.jpg", exif=exif)
    assert np.array_equal(fingerprints(tmp_path / "a.jpg"), fingerprints(tmp_path / "b.jpg"))


def test_other_formats_and_pictures_of_one_value(tmp_path):
    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(tmp_path / "a.png")
    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(tmp_path / "b.png", compress_level=0)
    assert np.array_equal(fingerprints(tmp_path / "a.png"), fingerprints(tmp_path / "b.png"))
    Image.new("L", (10, 8), 7).save(tmp_path / "flat.png")
    assert fingerprints(tmp_path / "flat.png").shape == (0, 32)
    manifest = volumes(tmp_path / "volumes", [(3, 8, 8)])
    (row,) = table(manifest)
    assert len(fingerprints(manifest.parent / row["image"])) == 3
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
    for bad in ("broken.dcm", "missing.png"):
        with pytest.raises(UnreadableImage):
            fingerprints(tmp_path / bad)


@pytest.fixture
def asked(tmp_path):
    """A function: the permit of a task at a site whose records are in one place, whatever its manifest."""
    (tmp_path / "site.toml").write_text("[policy.privacy]\nrequired = false\nepsilon = 4.0\n")
    oversight = Oversight(policy=tmp_path / "site.toml", folder=tmp_path / "records", keys=tmp_path / "keys")
    settings = settings_for_sites(run_file.validate({"task": {"labels": ["a", "b"]}}))
    empty = np.zeros(0, np.float32)
    task = Task(kind="train", round=1, settings=settings, layout="", weights=Weights(parameters=empty, buffers=empty))

    def ask(manifest: Path):
        data = load(manifest)
        permit = permitted(task, oversight, settings_from(settings), lambda: data)
        assert permit is not None
        return permit, cohort_of_patients(patients_of(data, np.arange(len(data))), manifest, LABELS, permit)

    return ask


def test_p12_a_re_pseudonymised_manifest_of_real_files_meets_the_same_budget(tmp_path, asked):
    manifest = site(tmp_path / "first", count=12)
    permit, cohort = asked(manifest)
    assert cohort.patients == 8 and len(cohort.digests) == 8 + 12
    (kept,) = (tmp_path / "records" / "cohorts").iterdir()
    os.utime(kept, (0, 0))
    assert asked(manifest)[1] == cohort  # found again without decoding
    assert kept.stat().st_mtime > 0, "and used just now, so that others make room before it"
    permit.ledger.reserve("run", 1, [step(2.0, 1.0, 1)], cohort)

    rows = table(manifest)
    again = tmp_path / "second"
    again.mkdir()
    for number, row in enumerate(rows):
        with Image.open(manifest.parent / row["image"]) as image:
            image.save(again / f"new-{number}.png", compress_level=1)
        row.update(patient_id=f"N{row['patient_id']}", image=f"new-{number}.png")
    with (again / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    permit, other = asked(again / "manifest.csv")
    assert other != cohort
    with pytest.raises(BudgetExhausted):
        permit.ledger.reserve("another", 1, [step(2.0, 1.0, 2)], other)
    for path in (tmp_path / "records").rglob("*"):
        assert path.is_dir() or b"NP1" not in path.read_bytes()


def test_data_that_are_no_images_charge_the_whole_site(tmp_path, asked):
    permit, _ = asked(site(tmp_path / "first"))
    assert cohort_of_patients(["P1"], None, LABELS, permit).is_everyone


def test_real_scans_have_fingerprints():
    series = REAL / "dicom" / "dev" / "series" / "mr_siemens_t1post_pgbm003"
    if not series.is_dir():
        pytest.skip("no real series beside the project")
    found = [bytes(row) for path in sorted(series.iterdir())[:5] for row in fingerprints(path)]
    assert len(set(found)) == 5
    assert all(len(each) == 32 for each in found)
