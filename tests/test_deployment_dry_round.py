"""The dry round of `fedmed site check`: ten patients, no record."""

import json
import re
import shutil
from pathlib import Path

import pytest
from real_consortium import command

from fedmed.deployment.checks import check_site
from fedmed.deployment.scratch import clear_scratch, in_use
from fedmed.deployment.site_folder import read_site_folder
from fedmed.errors import ConfigError


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A site with real DICOM files."""
    root = tmp_path_factory.mktemp("phantoms")
    command("data", "synth", root / "data", "--sites", 1, "--patients", 12)
    command("site", "init", root / "north", "--manifest", root / "data" / "site-1" / "manifest.csv")
    command("site", "keygen", root / "north")
    return root


def test_a_dry_round_trains_on_ten_patients_and_touches_no_record(phantoms, capsys):
    capsys.readouterr()
    with pytest.raises(ConfigError, match="checks failed"):  # it has joined nobody
        command("site", "check", phantoms / "north", "--json")
    found = {each["what"]: each for each in json.loads(capsys.readouterr().out)}
    assert [what for what, each in found.items() if not each["ok"]] == ["kit"]
    assert found["manifest"]["said"].endswith("of 12 patients")
    assert found["dry round"]["said"].startswith("10 patients, ")
    assert "GiB of memory" in found["dry round"]["said"]
    assert {"device", "limits of a task", "approval", "disk", "ledger", "versions"} <= set(found)
    assert not (phantoms / "north" / "state").exists()
    assert not [path for path in (phantoms / "north" / "flower" / "tmp").rglob("*") if path.is_file()]


def test_what_was_left_of_those_killed_is_removed_and_a_dry_round_under_way_keeps_its_files(phantoms, tmp_path):
    site = read_site_folder(Path(shutil.copytree(phantoms / "north", tmp_path / "copy")))
    with in_use(site) as folder:
        (folder / "tmpabc").mkdir()
        (folder / "tmpabc" / "manifest.csv").write_text("patient_id,image\np-1,x.png\n")
        (folder / "task-abc").mkdir()
        (folder / "pixels").touch()
        clear_scratch(site)
        assert {"tmpabc", "task-abc", "pixels"} <= {path.name for path in folder.iterdir()}
    clear_scratch(site)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("bad", "ok"), [(1, True), (99, False)])
def test_images_that_cannot_be_read_are_told_and_fail_the_check_if_they_are_most(phantoms, tmp_path, bad, ok):
    folder = Path(shutil.copytree(phantoms / "north", tmp_path / "copy"))
    source = phantoms / "data" / "site-1"
    header, *lines = (source / "manifest.csv").read_text().splitlines()
    place = header.split(",").index("image")
    cells = [line.split(",") for line in lines]
    for number, line in enumerate(cells):  # the first one too, by which the preset would be chosen
        line[place] = (
            "gone.dcm" if bad == 1 and number == 0 else str(source / line[place]) + (".gone" if bad > 1 else "")
        )
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join([header, *map(",".join, cells)]) + "\n")
    text = re.sub(r"manifest = .*", f'manifest = "{manifest}"', (folder / "site.toml").read_text())
    (folder / "site.toml").write_text(text)
    found = {each.what: each for each in check_site(folder)}["dry round"]
    assert found.ok == ok and "cannot be read" in found.said
    assert not ok or found.said.endswith("no such file: 1 (fedmed data check names the rows)")


def test_the_check_neither_counts_nor_opens_the_images_of_who_withdrew(phantoms, tmp_path):
    folder = Path(shutil.copytree(phantoms / "north", tmp_path / "copy"))
    source = phantoms / "data" / "site-1"
    header, *lines = (source / "manifest.csv").read_text().splitlines()
    place = header.split(",").index("image")
    cells = [line.split(",") for line in lines]
    gone = list(dict.fromkeys(line[0] for line in cells))[:2]
    for line in cells:  # an image that is not there would fail the dry round
        line[place] = "withdrawn.dcm" if line[0] in gone else str(source / line[place])
    manifest, listed = tmp_path / "manifest.csv", folder / "withdrawn.csv"
    manifest.write_text("\n".join([header, *map(",".join, cells)]) + "\n")
    text = re.sub(r"manifest = .*", f'manifest = "{manifest}"', (folder / "site.toml").read_text())
    (folder / "site.toml").write_text(text.replace('opt-out = ""', 'opt-out = "withdrawn.csv"'))
    found = {each.what: each for each in check_site(folder)}
    assert not found["manifest"].ok and "who withdrew: withdrawn.csv: cannot be read" in found["manifest"].said
    assert "\n" not in found["manifest"].said and "dry round" not in found
    listed.write_text("\n".join(["patient_id", *gone]) + "\n")
    found = {each.what: each for each in check_site(folder)}
    assert found["manifest"].said.endswith("of 10 patients; 2 more withdrew (opt-out)")
    assert found["dry round"].ok and found["dry round"].said.startswith("10 patients, ")
    listed.write_text("\n".join(["patient_id", *(line[0] for line in cells)]) + "\n")
    assert "opted out" in {each.what: each for each in check_site(folder)}["manifest"].said
