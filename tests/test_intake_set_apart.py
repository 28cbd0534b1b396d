"""Quarantine: a page of what a person must look at, and what becomes of an object once somebody did."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import cells_of, picture
from intake_files import PLANTED, named_object, pseudonyms_in, with_text
from PIL import Image

from fedmed.cli.quarantine import judge_quarantine
from fedmed.errors import ConfigError, DataError
from fedmed.intake.burned_in import lines_of_text
from fedmed.intake.keep import keep
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.set_apart import APART, chosen, set_apart


@pytest.fixture(scope="module")
def pseudonyms(tmp_path_factory: pytest.TempPathFactory) -> Pseudonyms:
    return pseudonyms_in(tmp_path_factory.mktemp("site"))


@pytest.fixture
def pulled(tmp_path: Path, pseudonyms: Pseudonyms) -> Path:
    """Four objects that were set apart: text, a header's word, a loop, and pixels that nobody decodes."""
    folder = tmp_path / "pulled images"
    loop = np.stack([cells_of(picture((200, 180)))] * 5)
    broken = named_object(4, syntax=pydicom.uid.JPEG2000Lossless)
    broken.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 60])
    keep(named_object(1, cells=with_text("QUISLING^WILHELMINA")), folder, pseudonyms)
    keep(named_object(2, BurnedInAnnotation="YES"), folder, pseudonyms)
    keep(named_object(3, cells=loop, BurnedInAnnotation="YES"), folder, pseudonyms)
    keep(broken, folder, pseudonyms)
    return folder


def pictures_in(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def test_the_page_shows_what_was_judged_to_its_owner_alone(fedmed, pulled: Path) -> None:
    done = fedmed("data", "quarantine", pulled)
    assert done.returncode == 0 and f"4 in quarantine; look at {pulled / 'quarantine.html'}" in done.stdout, done.stderr
    page = (pulled / "quarantine.html").read_text()
    assert (pulled / "quarantine.html").stat().st_mode & 0o777 == 0o600
    assert not any(word in page.lower() for word in PLANTED), "in the page's text"
    shown = pictures_in(page)
    assert len(shown) == 1 + 1 + 3 and "No decoder reads its pixels" in page
    assert lines_of_text(shown[0]) > 0, "a person can read it"
    assert re.findall(r"<h2>(\d):", page) == ["1", "2", "3", "4"]


def test_a_page_begins_where_it_is_told_to(pulled: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("fedmed.cli.quarantine.MOST", 2)
    judge_quarantine(pulled, released="", deleted="", start=1)
    assert f"further ones: fedmed data quarantine '{pulled}' --from 3" in capsys.readouterr().out
    assert "2 more in quarantine" in (pulled / "quarantine.html").read_text()
    judge_quarantine(pulled, released="", deleted="", start=3)
    assert "further" not in capsys.readouterr().out
    assert re.findall(r"<h2>(\d):", (pulled / "quarantine.html").read_text()) == ["3", "4"]


def test_released_objects_are_images_and_deleted_ones_are_gone(fedmed, pulled: Path, pseudonyms: Pseudonyms) -> None:
    first, _, _, broken = set_apart(pulled)
    done = fedmed("data", "quarantine", pulled, "--release", "2-3", "--delete", "1")
    assert "2 released, 1 deleted" in done.stdout and "1 in quarantine" in done.stdout, done.stderr
    assert [each.now for each in set_apart(pulled)] == ["removed by hand", "released", "released", "in quarantine"]
    assert not first.file.exists() and broken.file.exists()
    released = keep(named_object(2, BurnedInAnnotation="YES"), pulled, pseudonyms)
    assert released.reason is None and released.path is not None and released.path.exists()
    assert all(each.stat().st_mode & 0o077 == 0 for each in (pulled / "images").rglob("*"))
    assert re.findall(r"<h2>(\d):", (pulled / "quarantine.html").read_text()) == ["4"], "no picture of who is gone"
    assert "nothing is in quarantine" in fedmed("data", "quarantine", pulled, "--delete", "all").stdout
    assert not (pulled / "quarantine.html").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "expected rows"), ("1;2", "expected rows"), ("0", "row 0"), ("2-9", "row 5"), ("1-999999999", "row 5")],
)
def test_refuses_rows_that_are_not_in_quarantine(pulled: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        chosen(text, set_apart(pulled))


def test_nothing_is_moved_where_anything_is_wrong(fedmed, pulled: Path) -> None:
    for words in (("--release", "1,7"), ("--release", "1", "--delete", "1-2"), ("--release", "all", "--delete", "4")):
        done = fedmed("data", "quarantine", pulled, *words)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "row" in done.stderr
        assert {each.now for each in set_apart(pulled)} == {APART}


def test_a_folder_without_quarantine_says_so(fedmed, tmp_path: Path) -> None:
    assert fedmed("data", "quarantine", tmp_path).stdout == "nothing is in quarantine\n"
    with pytest.raises(DataError, match="no such folder"):
        set_apart(tmp_path / "pulld")
