"""A hospital's first day, from an archive full of names to a federated round, and nothing that names anybody leaves."""

import csv
import json
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from dicom_files import cells_of, image_object, written
from flwr.common.serde import message_to_proto
from orthanc import MISSING, PASSWORD, USER, Orthanc
from PIL import Image, ImageDraw, ImageFont
from recorder import spellings

from fedmed import config as run_file
from fedmed.cli.intake import check_data, import_data, write_card
from fedmed.cli.pull import site_pseudonyms
from fedmed.federated.local_grid import LocalGrid
from fedmed.intake.check import here
from fedmed.intake.dicomweb import DicomWeb
from fedmed.intake.pull import pull
from fedmed.intake.query import Query

pytestmark = pytest.mark.simulation

BURNED = (  # text, its left upper corner in a picture of 256 × 256, letter height in px, grey, grey behind it or none
    ("ZEBRAFINCH PATIENT", (6, 4), 14, 255, None),
    ("Zebrafinch, P. 17.01.1950", (60, 232), 16, 20, 235),
    ("KEA ANN", (176, 8), 18, 255, None),
    ("770003", (180, 226), 22, 255, 0),
)


@dataclass
class Archive:
    """What a hospital has: files, a sheet of labels, a list of who withdrew; and every word that must stay there."""

    folder: Path
    planted: set[str] = field(default_factory=set)

    def add(self, patient: int, study: int, pixels: np.ndarray, *, burned: int | None = None, alias: str = "") -> str:
        """One radiograph; returns its accession number."""
        name, number = f"Zebrafinch^Patient{patient}{alias}", f"MRN-{770000 + patient}{alias}"
        accession, birth = f"ACC-{880000 + study}", f"1950{patient % 12 + 1:02}17"
        picture = Image.fromarray((pixels * 255).astype(np.uint8))
        if burned is not None:
            text, corner, size, grey, behind = BURNED[burned]
            draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=size)
            if behind is not None:
                left, upper, right, lower = draw.textbbox(corner, text, font=font)
                draw.rectangle((left - 4, upper - 4, right + 4, lower + 4), fill=behind)
            draw.text(corner, text, fill=grey, font=font)
        ds = image_object(
            cells_of(np.asarray(picture) / 255), PatientID=number, PatientName=name, PatientBirthDate=birth,
            AccessionNumber=accession, ReferringPhysicianName="Kakapo^Doctor", InstitutionName="Wombat Hospital",
            StudyDescription=f"chest of {name}", StudyInstanceUID=f"1.2.840.99.{study}", Modality="DX",
            SeriesInstanceUID=f"1.2.840.98.{study}", SOPInstanceUID=f"1.2.840.97.{study}", StudyDate="20200517",
            ViewPosition="PA", Manufacturer="Maker",
        )  # fmt: skip
        private = ds.private_block(0x0009, "QUOKKA", create=True)
        private.add_new(0x01, "LO", name)
        place = self.folder / name.replace("^", "_")
        place.mkdir(parents=True, exist_ok=True)
        written(ds, place / f"{name}-{accession}.dcm")
        self.planted |= {name, number, accession, birth, "Zebrafinch", "Kakapo", "Wombat", "QUOKKA"}
        self.planted |= {f"1.2.840.{root}.{study}" for root in (97, 98, 99)} | {"20200517", place.name}
        return accession


def hospital(folder: Path, first: int) -> Archive:
    """Fourteen patients of two radiographs each, one of them under two ids; four radiographs show who is on them."""
    archive = Archive(folder / "export")
    rng = np.random.default_rng(first)
    rows = []
    for patient in range(first, first + 14):
        for study in (10 * patient, 10 * patient + 1):
            burned = patient - first if patient < first + len(BURNED) and study % 10 == 0 else None
            pixels = 0.55 * np.kron(rng.random((8, 8)), np.ones((32, 32)))
            accession = archive.add(patient, study, pixels, burned=burned)
            rows.append([accession, f"MRN-{770000 + patient}", ("ja", "nein")[study % 2], 40 + patient % 30])
            if patient == first + 5 and study % 10 == 0:
                again = archive.add(patient, study + 5, pixels, alias="-B")
                rows.append([again, "", "ja", 41])
    kept = [row for number, row in enumerate(rows) if number % 10 != 9]  # a tenth of the images has no row
    kept += [[f"ACC-{990000 + number}", "", "ja", 50] for number in range(4)]  # and some rows have no image
    with (folder / "ris.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([["Accession Number", "MRN", "Erguss", "Age"], *kept])
    (folder / "withdrawn.csv").write_text(
        "patient_id\n" + "".join(f"MRN-{770000 + first + number}\n" for number in (8, 9, 10))
    )
    return archive


@pytest.fixture(
    params=[
        "export",
        pytest.param(
            "pacs",
            marks=[
                pytest.mark.pacs,
                pytest.mark.skipif(MISSING, reason="orthanc, orthanc-dicomweb or dcmtk is missing"),
            ],
        ),
    ]
)
def pacs(request, tmp_path, monkeypatch):
    """A PACS for the north, or None: its archive is an export on a disk, as the south's is."""
    if request.param == "export":
        yield None
        return
    monkeypatch.setenv("FEDMED_PACS_USER", USER)
    monkeypatch.setenv("FEDMED_PACS_PASSWORD", PASSWORD)
    (tmp_path / "pacs" / "db").mkdir(parents=True)
    running = Orthanc(tmp_path / "pacs")
    running.start()
    yield running
    running.kill()


def first_day(
    folder: Path, monkeypatch: pytest.MonkeyPatch, first: int, pacs: Orthanc | None = None
) -> tuple[Archive, Path]:
    """Pull if there is a PACS, import, look at labels.toml, check, mend, check again, card."""
    monkeypatch.setattr("fedmed.intake.check.apart", here)
    folder.mkdir()
    archive, out = hospital(folder, first), folder / folder.name
    source, keys = archive.folder, site_pseudonyms(None, folder / "keys")
    if pacs:
        pacs.store(sorted(source.rglob("*.dcm")))
        shutil.rmtree(source)
        source = out
        pulled = pull(DicomWeb(f"http://127.0.0.1:{pacs.web}/dicom-web"), Query(modalities=("DX",)), source, keys)
        assert (pulled.images, sum(pulled.quarantined.values()), pulled.failed) == (25, 4, 0)
    settings = {
        "table": folder / "ris.csv", "labels": None, "opt_out": folder / "withdrawn.csv", "uncertain": "ignore",
    }  # fmt: skip
    assert not import_data("dicom", source, out, keys, **settings)  # a first guess at labels.toml
    assert 'positive = ["ja"]' in (out / "labels.toml").read_text()
    assert import_data("dicom", source, out, keys, **settings)
    assert not check_data(out, labels=(), html=None, as_json=False)  # one person under two ids
    facts = json.loads((out / "check.json").read_text())
    (leak,) = [finding for finding in facts["findings"] if finding["state"] == "fail"]
    assert leak["what"] == "leaks" and len(leak["rows"]) == 2
    lines = (out / "manifest.csv").read_text().splitlines()
    one, other = (lines[row - 1].split(",")[0] for row in leak["rows"])
    (out / "manifest.csv").write_text("\n".join(line.replace(other, one, 1) for line in lines) + "\n")
    assert check_data(out, labels=("erguss",), html=folder / "check.html", as_json=False)
    write_card(out, folder / "card.json")
    return archive, out


def overheard(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What sites answer in a round, as it stands on the wire."""
    pull_messages, heard = LocalGrid.pull_messages, []

    def listening(grid, numbers):
        answers = list(pull_messages(grid, numbers))
        for array in (
            a for answer in answers for record in answer.content.array_records.values() for a in record.values()
        ):
            array.data = bytes(array.data)  # of a view into the worker's memory
        heard.extend(message_to_proto(answer).SerializeToString() for answer in answers)
        return answers

    monkeypatch.setattr(LocalGrid, "pull_messages", listening)
    return heard


def test_from_an_archive_full_of_names_to_a_round_that_tells_none(tmp_path, monkeypatch, simulate, pacs):
    days = (("north", 100, pacs), ("south", 300, None))
    sites = {name: first_day(tmp_path / name, monkeypatch, first, archive) for name, first, archive in days}
    for _, out in sites.values():
        with (out / "manifest.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(list((out / "quarantine").glob("*.dcm"))) == len(BURNED)  # every one, and nothing else
        assert len({row["patient_id"] for row in rows}) == 11  # three withdrew; of two a radiograph is in quarantine
        unmatched = (out / "unmatched.csv").read_text()
        assert unmatched.count("row without image") >= 4
        assert unmatched.count("image without row") in (1, 2)  # one is of a patient who withdrew, whom an import skips
    config = run_file.validate(
        {
            "name": "first-day", "model": {"name": "toy:network"}, "task": {"labels": ["erguss"]},
            "data": {"sites": [str(out / "manifest.csv") for _, out in sites.values()], "image-size": 8},
            "train": {"rounds": 1}, "strategy": {"min-sites": 2}, "simulation": {"workers": 1, "device": "cpu"},
        }
    )  # fmt: skip
    heard = overheard(monkeypatch)
    result, run = simulate(config)
    assert result["status"] == "completed" and len(result["sites"]) == 2
    local = {"run.toml", "sites"}  # see DESIGN: they stay on the machine
    left = [path for path in run.path.rglob("*") if path.is_file() and path.relative_to(run.path).parts[0] not in local]
    left += [tmp_path / name / "card.json" for name in sites]
    assert len(left) > 6
    kept = [path for _, out in sites.values() for path in out.rglob("*") if path.is_file()]
    planted = {word for archive, _ in sites.values() for word in archive.planted}
    pseudonyms = {
        line.split(",")[0] for _, out in sites.values() for line in (out / "manifest.csv").read_text().split()
    }
    of_a_file = {path.name: path.read_bytes() + b"\0" + path.name.encode() for path in left}
    told = of_a_file | {f"answer {number}": answer for number, answer in enumerate(heard)}
    assert sum(b"parameters" in answer for answer in heard) >= 2  # an update of each site
    assert not holding(told, planted | pseudonyms - {"patient_id"})
    assert not holding({path.name: path.read_bytes() + b"\0" + path.name.encode() for path in kept}, planted)


def test_the_day_can_be_tried_on_phantoms_with_the_commands_of_its_page(tmp_path, fedmed_process):
    page = (Path(__file__).parent.parent / "docs" / "first-day.md").read_text(encoding="utf-8")
    lines = page.split("## To try it first")[1].split("```")[1].strip().splitlines()
    done = [fedmed_process(*shlex.split(line)[1:], cwd=tmp_path) for line in lines]
    assert [each.returncode for each in done] == [0, 0, 0, 1, 0, 0, 0], [each.stderr for each in done]
    assert json.loads((tmp_path / "trial-north-data.json").read_text())["patients"] == 40


def holding(contents: dict[str, bytes], words: set[str]) -> list[str]:
    """The names of those in which one of the words stands, in any spelling and case."""
    spelt = {each.lower() for word in words for each in spellings(word) if len(each) >= len(word)}  # shorter is chance
    return [name for name, content in contents.items() if any(each in content.lower() for each in spelt)]
