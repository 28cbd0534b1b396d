"""The data check: what would spoil a training is found, by row, and in words that say what to do."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import SECRET, cells_of, image_object, picture, written
from hypothesis import given
from hypothesis import strategies as st
from image_sets import volumes
from PIL import Image
from pydicom.uid import MRImageStorage, SecondaryCaptureImageStorage

from fedmed.cli.intake import check_data
from fedmed.errors import ConfigError, DataError
from fedmed.federated.phantoms import make_phantoms
from fedmed.intake.check import check, here
from fedmed.intake.near_duplicates import near_duplicates
from fedmed.reporting.data_check import render_check


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process takes longer than looking at six pictures; the command's test and the first one do."""
    if request.function is not test_a_good_set_passes_and_is_counted:
        monkeypatch.setattr("fedmed.intake.check.apart", here)


def site(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A manifest with these cells; a cell that is an array becomes a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        for column in ("image", "mask"):
            if isinstance(row.get(column), np.ndarray):
                name = f"{column}-{number}.png"
                Image.fromarray(row[column]).save(folder / name)
                row[column] = name
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def noise(seed: int, shape: tuple[int, int] = (48, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def good(count: int = 6) -> list[dict[str, Any]]:
    return [
        {"patient_id": f"p{n // 2}", "image": noise(n), "a": str(n % 2), "b": str(n // 2 % 2)} for n in range(count)
    ]


def states(facts: dict[str, Any]) -> dict[str, str]:
    """The worst state of each thing that was looked at."""
    order = ("pass", "warn", "fail")
    found: dict[str, str] = {}
    for finding in facts["findings"]:
        found[finding["what"]] = max(found.get(finding["what"], "pass"), finding["state"], key=order.index)
    return found


def said(facts: dict[str, Any], what: str) -> dict[str, Any]:
    return next(each for each in facts["findings"] if each["what"] == what and each["state"] != "pass")


def test_a_good_set_passes_and_is_counted(tmp_path):
    facts = check(site(tmp_path, good()))
    assert facts["state"] == "pass" and set(states(facts).values()) == {"pass"}
    assert (facts["patients"], facts["images"], facts["unreadable"]) == (3, 6, {})
    assert facts["labels"]["a"] == {
        "positive": 3, "negative": 3, "unknown": 0, "positive_patients": 3, "negative_patients": 0,
    }  # fmt: skip
    assert len(facts["pictures"]) == 6
    json.dumps(facts, allow_nan=False)


def test_the_same_picture_under_two_patients_fails_and_under_one_warns(tmp_path):
    rows = good()
    rows[5]["image"], rows[1]["image"] = rows[0]["image"].copy(), rows[0]["image"].copy()
    facts = check(site(tmp_path, rows))
    assert facts["state"] == "fail" and said(facts, "leaks")["rows"] == [2, 3, 7]
    rows = good()
    rows[1]["image"] = rows[0]["image"].copy()
    facts = check(site(tmp_path / "one", rows))
    assert facts["state"] == "warn" and said(facts, "copies")["rows"] == [2, 3]


def test_a_resized_and_compressed_copy_in_another_split_is_seen(tmp_path):
    rows = [{**row, "split": "test" if row["patient_id"] == "p2" else "train"} for row in good()]
    original = np.rint(picture((96, 96)) * 255).astype(np.uint8)
    Image.fromarray(original).resize((60, 60)).save(tmp_path / "copy.jpg", quality=60)
    rows[0]["image"], rows[5]["image"] = original, "copy.jpg"
    facts = check(site(tmp_path, rows))
    assert states(facts)["leaks"] == "pass" and said(facts, "look-alikes")["rows"] == [2, 7]
    assert facts["state"] == "warn"


def test_pictures_of_12_bits_in_16_are_warned_of(tmp_path):
    rows = good()
    for row, factor in zip(rows, (1, 16, 16, 16, 16, 0), strict=True):
        row["image"] = row["image"].astype(np.uint16) * 16 * factor
    facts = check(site(tmp_path, rows))
    assert said(facts, "kinds")["rows"] == [2] and "1 picture of 16 bits" in said(facts, "kinds")["said"]


def test_a_patient_in_two_splits_fails(tmp_path):
    facts = check(site(tmp_path, [{**row, "split": "train" if n < 3 else "test"} for n, row in enumerate(good())]))
    assert said(facts, "splits")["rows"] == [4, 5] and facts["state"] == "fail"


def test_unreadable_images_are_counted_by_a_reason_that_names_nothing(tmp_path):
    rows = good(60)
    (tmp_path / f"{SECRET}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    rows[0]["image"], rows[2]["image"] = f"{SECRET}.png", "gone.png"
    facts = check(site(tmp_path, rows))
    assert said(facts, "images")["state"] == "warn" and said(facts, "images")["rows"] == [2, 4]
    assert facts["unreadable"]["no such file"] == 1 and sum(facts["unreadable"].values()) == 2
    assert SECRET not in json.dumps(facts)
    rows[4]["image"] = rows[6]["image"] = "gone-too.png"
    assert check(site(tmp_path, rows))["state"] == "fail"


def test_where_no_image_can_be_read_nothing_is_said_to_be_clean(tmp_path):
    rows = [{**row, "image": f"gone-{number}.png"} for number, row in enumerate(good())]
    facts = check(site(tmp_path, rows))
    for what in ("identity", "leaks", "look-alikes"):
        assert states(facts)[what] == "fail" and "nothing was checked" in said(facts, what)["said"]
    assert "nothing was checked" in render_check(facts)
    few = check(site(tmp_path / "few", [*good(40), {**good(1)[0], "patient_id": "p99", "image": "gone.png"}]))
    (identity,) = (each for each in few["findings"] if each["what"] == "identity")
    assert identity["state"] == "pass" and "in the 40 images that can be read" in identity["said"]


def test_labels_without_values_or_with_one_class(tmp_path):
    rows = [{**row, "a": "1", "c": ""} for row in good()]
    facts = check(site(tmp_path, rows), labels=("a", "b", "c"))
    assert states(facts)["label a"] == states(facts)["label c"] == "warn" and facts["state"] == "warn"
    rows = [{**row, "a": "", "b": ""} for row in good()]
    assert said(check(site(tmp_path / "none", rows), labels=("a", "b")), "labels")["state"] == "fail"
    assert check(site(tmp_path / "nothing", [{**row, "a": "x", "b": "y"} for row in good()]))["state"] == "fail"
    missing = check(site(tmp_path / "missing", good()), labels=("nodule",))
    assert 'no column "nodule"' in said(missing, "manifest")["said"]


def test_masks_of_another_size_fail_and_empty_ones_warn(tmp_path):
    full = np.ones((48, 40), np.uint8)
    rows = [{"patient_id": f"p{n}", "image": noise(n), "mask": full.copy()} for n in range(4)]
    assert check(site(tmp_path / "good", rows))["state"] == "pass"
    rows[1]["mask"] = 0 * full
    facts = check(site(tmp_path / "good", rows))
    assert (facts["state"], said(facts, "masks")["rows"]) == ("warn", [3])
    rows[2]["mask"] = full[:20]
    facts = check(site(tmp_path / "good", rows))
    assert facts["state"] == "fail" and said(facts, "masks")["rows"] == [4]


def test_numbers_of_masks_are_compared_with_the_labels_of_the_task(tmp_path):
    numbers = np.resize(np.array([0, 1, 2, 4], np.uint8), (48, 40))
    place = site(tmp_path, [{"patient_id": f"p{n}", "image": noise(n), "mask": numbers.copy()} for n in range(4)])
    facts = check(place, labels=("core", "oedema", "enhancing"))
    assert said(facts, "masks")["said"] == "4 masks: the mask holds 4, but the task has 3 labels"
    assert facts["state"] == "fail" and states(facts)["manifest"] == "pass"
    assert check(place, labels=("core", "oedema", "other", "enhancing"))["state"] == "pass"
    assert check(place, labels=("tumour",))["state"] == check(place)["state"] == "pass"


def test_images_are_read_with_the_preset_of_the_run_or_one_of_their_modality(tmp_path):
    colours = np.stack([noise(1)] * 3, axis=-1)
    values = cells_of(picture()) + np.arange(4)[:, None, None].astype(np.uint16)
    mr = {"SOPClassUID": MRImageStorage, "Modality": "MR", "WindowCenter": "0.5", "WindowWidth": "0.5"}
    objects = [
        image_object(colours, bits=8, PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0),
        *(image_object(np.roll(cells, 9 * number), **mr) for number, cells in enumerate(values)),
    ]
    rows = []
    for number, ds in enumerate(objects):
        written(ds, tmp_path / f"{number}.dcm")
        rows.append({"patient_id": f"p{number}", "image": f"{number}.dcm", "a": str(number % 2)})
    place = site(tmp_path, rows)
    assert check(place)["unreadable"] == {}
    assert check(place, preset="mr")["unreadable"] == {"colour image": 1}
    assert check(place, preset="ct-soft")["state"] == "fail"
    with pytest.raises(ConfigError, match=r"data\.preset"):
        check(place, preset="xray")


def test_dicom_that_names_somebody_is_a_secondary_capture_or_shows_a_name(tmp_path):
    plain = {"PatientIdentityRemoved": "YES", "PatientName": None, "Manufacturer": "Maker", "PixelSpacing": [0.2, 0.2]}
    changes: list[dict[str, Any]] = [
        plain, plain, plain | {"PatientName": SECRET, "PatientID": "7", "PatientIdentityRemoved": None},
        plain | {"SOPClassUID": SecondaryCaptureImageStorage}, plain | {"BurnedInAnnotation": "YES"},
        plain | {"PatientBirthDate": "19340301"}, plain | {"PatientName": "Anonymous"},
        plain | {"PatientIdentityRemoved": None, "PatientName": "0004cfab", "PatientID": "0004cfab"},  # as RSNA's
        plain | {"PatientIdentityRemoved": None, "PatientName": "Anonymous", "PatientBirthDate": "19000101"},
        plain | {"InstitutionName": "ANONYMIZED", "PatientBirthDate": "19000101"},
        plain | {"PatientIdentityRemoved": None, "InstitutionName": SECRET},
    ]  # fmt: skip
    rows = []
    for number, tags in enumerate(changes):
        cells = np.roll(cells_of(picture()), 9 * number, axis=1)
        written(image_object(cells, **tags), tmp_path / f"{number}.dcm")
        rows.append({"patient_id": f"p{number}", "image": f"{number}.dcm", "a": str(number % 2)})
    facts = check(site(tmp_path, rows))
    identity = {finding["said"]: finding["rows"] for finding in facts["findings"] if finding["what"] == "identity"}
    assert identity["2 images with the name of a patient, a doctor or a hospital in the header"] == [4, 12]
    assert identity["2 images not marked as de-identified"] == [9, 10]
    marked = "marked as de-identified, with a birth date, other id, doctor or hospital in the header"
    assert identity[f"2 images {marked}"] == [7, 11]
    assert states(facts)["identity"] == facts["state"] == "fail"
    assert "fedmed data import dicom" in said(facts, "identity")["do"]
    assert identity["1 image: burned-in annotation, says its header"] == [6]
    assert said(facts, "kinds")["rows"] == [5]
    assert facts["counts"]["maker"] == {"Maker": 11} and facts["spacing_mm"] == [0.2] * 11
    assert SECRET not in json.dumps(facts)


def test_dummies_of_marked_images_do_not_fail_a_check(tmp_path):
    tags = {"PatientIdentityRemoved": "YES", "InstitutionName": "ANONYMIZED", "PatientBirthDate": "19000101"}
    rows = []
    for number in range(2):
        cells = np.roll(cells_of(picture()), 9 * number, axis=1)
        written(image_object(cells, **tags), tmp_path / f"{number}.dcm")
        rows.append({"patient_id": f"p{number}", "image": f"{number}.dcm", "a": str(number)})
    assert states(check(site(tmp_path, rows)))["identity"] == "warn"


def test_phantoms_name_nobody(tmp_path):
    make_phantoms(tmp_path / "phantoms", "cxr", sites=2, patients=2, seed=7)
    assert states(check(tmp_path / "phantoms" / "site-1" / "manifest.csv"))["identity"] == "pass"


def test_what_passes_says_what_was_looked_at(tmp_path):
    rows = good(4)
    for number in (0, 1):
        cells = np.roll(cells_of(picture()), 9 * number, axis=1)
        written(image_object(cells, PatientIdentityRemoved="YES"), tmp_path / f"{number}.dcm")
        rows[number]["image"] = f"{number}.dcm"
    (identity,) = (each for each in check(site(tmp_path, rows))["findings"] if each["what"] == "identity")
    assert identity["state"] == "pass" and "hospital in the headers" in identity["said"]
    assert "no text seen in the 4 pictures searched for it" in identity["said"]
    (plain,) = (each for each in check(site(tmp_path / "b", good()))["findings"] if each["what"] == "identity")
    assert plain["said"] == "no text seen in the 6 pictures searched for it"


def test_volumes_are_checked_with_their_masks_and_spacings(tmp_path):
    facts = check(volumes(tmp_path, [(6, 8, 9), (5, 7, 8), (4, 6, 6)]), labels=())
    assert facts["gap_mm"] == [1.0] * 3 and facts["counts"]["format"] == {"NIfTI": 3}
    assert states(facts)["masks"] == "pass"


@pytest.mark.parametrize("content", ["", "patient_id,image\n", "name,image\na,b\n", "patient_id,image\na\n"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.csv").write_text(content)
    with pytest.raises(DataError, match="manifest"):
        check(tmp_path / "manifest.csv")


def test_near_duplicates_are_those_of_corrcoef(monkeypatch):
    monkeypatch.setattr("fedmed.intake.near_duplicates.BLOCK", 7)
    rng = np.random.default_rng(4)
    base = rng.integers(0, 256, (10, 24, 24))
    pictures = np.concatenate(
        [base, np.clip(base + rng.normal(0, 12, base.shape), 0, 255), base[:3] // 2 + 60, base[:1] * 0]
    )
    pictures = pictures.astype(np.uint8)
    patients, splits = np.arange(len(pictures)) // 2, np.arange(len(pictures)) % 2
    found = near_duplicates(pictures, patients, splits, correlation=0.97)
    with np.errstate(invalid="ignore"):
        truth = np.corrcoef(pictures.reshape(len(pictures), -1)) > 0.97
    expected = {(a, b) for a, b in zip(*np.nonzero(np.triu(truth, 1)), strict=True)}
    assert {tuple(pair) for pair in found.pairs.tolist()} == expected and found.count == len(expected) > 10
    one = np.zeros(len(pictures), np.int64)
    assert near_duplicates(pictures, one, one).count == 0


@given(shift=st.floats(0, 60), scale=st.floats(0.3, 0.7), order=st.permutations(range(8)))
def test_brightness_contrast_and_order_change_no_near_duplicate(shift, scale, order):
    pictures = np.random.default_rng(1).integers(0, 256, (4, 24, 24))
    changed = np.rint(pictures * scale + shift)
    both = np.concatenate([pictures, changed]).astype(np.uint8)[list(order)]
    found = near_duplicates(both, np.arange(8), np.zeros(8, np.int64))
    assert {frozenset((order[a] % 4, order[b] % 4)) for a, b in found.pairs.tolist()} == {
        frozenset((n,)) for n in range(4)
    }


def test_the_page_shows_what_was_found_and_loads_nothing_from_elsewhere(tmp_path):
    rows = good()
    rows[0]["patient_id"] = "<script>alert(1)</script>"
    rows[5]["image"] = rows[1]["image"].copy()
    page = render_check(check(site(tmp_path, rows)))
    assert "Not ready to train." in page and "the same picture under different patients" in page
    assert page.count("data:image/jpeg;base64,") == 6
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_a_distribution_of_one_value_is_said_in_words(tmp_path):
    rows = good()
    facts = check(site(tmp_path, rows))
    page = render_check(facts)
    single = [name for name, each in facts["histograms"].items() if each["range"][0] == each["range"][1]]
    assert "longest side, pixels" in single
    assert "<p>Longest side, pixels: 48 in every case</p>" in page
    assert page.count('aria-label="Histogram of') == len(facts["histograms"]) - len(single)


def test_json_holds_no_pictures_and_the_page_is_for_its_owner_alone(tmp_path, capsys):
    place = site(tmp_path / "good", good()).parent
    assert check_data(place, labels=(), html=tmp_path / "page.html", as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == "pass" and "pictures" not in facts
    assert json.loads((place / "check.json").read_text()) == facts
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "page.html", place / "check.json"))


def test_a_manifest_that_names_no_image_is_not_ready_and_says_what_to_do(tmp_path, fedmed):
    done = fedmed("data", "check", site(tmp_path, [{**row, "image": ""} for row in good()]))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert 'images: no row names one → fill the column "image"' in done.stdout


def test_the_command_ends_with_1_when_training_would_be_wrong(tmp_path, fedmed):
    rows = good()
    rows[5]["image"] = rows[0]["image"].copy()
    done = fedmed("data", "check", site(tmp_path / "bad", rows))
    assert done.returncode == 1 and "FAIL" in done.stdout and "Traceback" not in done.stderr
