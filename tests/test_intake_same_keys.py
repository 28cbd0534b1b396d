"""Under other keys tables and lists of who withdrew match nobody, so other keys are refused wherever they are used."""

import json
from pathlib import Path

import pytest
from dicom_files import written
from import_files import picture, rows
from intake_files import named_object
from loopback_archive import Holdings, archive_of
from real_consortium import command

from fedmed.cli.pull import site_pseudonyms
from fedmed.deployment.checks import keys as look_at_keys
from fedmed.deployment.node_keys import make_node_key
from fedmed.deployment.site_folder import read_site_folder
from fedmed.errors import ConfigError, DataError
from fedmed.federated.site_config import withdrawn_of
from fedmed.intake.check import here
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.same_keys import CHECK, made_with
from fedmed.privacy.keys import make_keys, read_keys

OTHERS = "was filled with other keys"


def pull(address: str, out: Path, keys: Path) -> int:
    return command("data", "pull", "--pacs", address, "--called", "ARCHIVE", "--calling", "FEDMED",
                   "--query", "modality=DX", "--keys", keys, "--out", out)  # fmt: skip


def test_a_folder_that_was_pulled_is_only_pulled_into_and_imported_with_its_keys(tmp_path, capsys):
    pulled, right, wrong = tmp_path / "pulled", tmp_path / "keys", tmp_path / "kyes"
    words = ("data", "import", "dicom", pulled, "--out", tmp_path / "out", "--keys")
    with archive_of(Holdings(named_object())) as address:
        pull(address, pulled, right)
        assert "made new keys in" in capsys.readouterr().err
        for again in (lambda: pull(address, pulled, wrong), lambda: command(*words, wrong)):
            with pytest.raises(ConfigError, match="no keys there, and others made the pseudonyms in"):
                again()
        assert not wrong.exists()  # a mistyped folder makes no keys
        make_keys(wrong)
        for again in (lambda: pull(address, pulled, wrong), lambda: command(*words, wrong)):
            with pytest.raises(DataError, match=OTHERS):
                again()
        pull(address, pulled, right)
    sheet = tmp_path / "labels.csv"
    sheet.write_text("accession,effusion\nACC8841907,1\n")
    capsys.readouterr()
    assert command(*words, right, "--table", sheet) == 1
    command(*words, right, "--table", sheet)
    assert "warning" not in capsys.readouterr().err
    assert made_with(Pseudonyms(keys=read_keys(right)), tmp_path / "out")
    assert (tmp_path / "out" / CHECK).stat().st_mode & 0o077 == 0


def test_a_folder_of_an_older_fedmed_is_taken_with_a_warning_and_nothing_is_noted_of_it(tmp_path, capsys):
    (tmp_path / "export").mkdir()
    written(named_object(), tmp_path / "export" / "1.dcm")
    sheet = tmp_path / "labels.csv"
    sheet.write_text("accession,effusion\nACC8841907,1\n")
    keys = ("--keys", tmp_path / "keys", "--table", sheet)
    for _ in range(2):
        command("data", "import", "dicom", tmp_path / "export", "--out", tmp_path / "taken", *keys)
    (tmp_path / "taken" / CHECK).unlink()
    capsys.readouterr()
    for _ in range(2):
        command("data", "import", "dicom", tmp_path / "taken", "--out", tmp_path / "out", *keys)
    assert "does not say which keys made its pseudonyms" in capsys.readouterr().err
    assert not (tmp_path / "taken" / CHECK).exists() and not (tmp_path / "out" / CHECK).exists()


def test_a_site_with_other_keys_than_its_manifest_neither_passes_its_check_nor_trains(tmp_path):
    site, right = tmp_path / "north", make_keys(tmp_path / "keys")
    (site / "chest").mkdir(parents=True)
    make_keys(site / "keys")
    make_node_key(site / "keys")
    (site / "site.toml").write_text('name = "north"\nmanifest = "chest/manifest.csv"\nopt-out = "withdrawn.csv"\n')
    (site / "withdrawn.csv").write_text("patient_id\nMRN 5\n")
    assert len(withdrawn_of(site / "site.toml")) == 2  # nothing is noted: as before
    (site / "chest" / CHECK).write_text(f"{Pseudonyms(keys=right).check}\n")
    with pytest.raises(DataError, match=OTHERS) as raised:
        withdrawn_of(site / "site.toml")
    assert str(tmp_path) not in raised.value.public and "other keys" in raised.value.public
    with pytest.raises(DataError, match=OTHERS):
        look_at_keys(read_site_folder(site))
    (site / "chest" / CHECK).write_text(f"{Pseudonyms(keys=read_keys(site / 'keys')).check}\n")
    assert "pseudonyms are by them" in look_at_keys(read_site_folder(site))
    assert len(withdrawn_of(site / "site.toml")) == 2


def test_a_site_and_keys_together_are_refused_as_such(tmp_path):
    with pytest.raises(ConfigError, match="not both"):
        site_pseudonyms(tmp_path, tmp_path / "keys")


def test_an_import_for_a_site_leaves_out_whom_its_site_toml_lists(tmp_path, capsys):
    site = tmp_path / "north"
    site.mkdir()
    make_keys(site / "keys")
    (site / "site.toml").write_text('name = "north"\nmanifest = "chest/manifest.csv"\nopt-out = "withdrawn.csv"\n')
    (site / "withdrawn.csv").write_text("patient_id\nb\n")
    for name in ("images/a", "images/b", "masks/a", "masks/b"):
        picture(tmp_path / "set" / f"{name}.png")
    words = ("data", "import", "pairs", tmp_path / "set", "--out", site / "chest", "--site", site)
    command(*words)
    assert "left out: 1 patient who withdrew" in capsys.readouterr().err and len(rows(site / "chest")) == 1
    (site / "withdrawn.csv").unlink()
    with pytest.raises(DataError, match="withdrew"):  # as a task would say
        command(*words)


def test_a_check_and_a_card_for_a_site_count_nobody_who_withdrew(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmed.intake.check.apart", here)
    site = tmp_path / "north"
    site.mkdir()
    make_keys(site / "keys")
    (site / "site.toml").write_text('name = "north"\nmanifest = "set/manifest.csv"\nopt-out = "withdrawn.csv"\n')
    (site / "withdrawn.csv").write_text("patient_id\n")
    lines = [f"p{number},{picture(site / 'set' / f'{number}.png', number).name},{number % 2}" for number in range(4)]
    (site / "set" / "manifest.csv").write_text("\n".join(["patient_id,image,a", *lines]) + "\n")
    words = ("set", "--site", site)
    monkeypatch.chdir(site)
    command("data", "check", *words)
    (site / "withdrawn.csv").write_text("patient_id\np1\n")
    with pytest.raises(DataError, match="check again with --site"):
        command("data", "card", *words, "--out", "card.json")
    command("data", "check", *words)
    facts = json.loads((site / "set" / "check.json").read_text())
    assert (facts["patients"], facts["images"], facts["labels"]["a"]["positive"]) == (3, 3, 1)
    command("data", "card", *words, "--out", "card.json")
    make_keys(tmp_path / "others")
    (site / "set" / CHECK).write_text(f"{Pseudonyms(keys=read_keys(tmp_path / 'others')).check}\n")
    with pytest.raises(DataError, match=OTHERS):
        command("data", "check", *words)


@pytest.mark.parametrize("words", [("check",), ("card", "--out", "card.json")])
def test_a_check_and_a_card_make_no_keys(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text('name = "north"\nmanifest = "rows.csv"\n')
    (tmp_path / "rows.csv").write_text("patient_id,image\np1,1.png\n")  # beside which no pull or import left anything
    with pytest.raises(ConfigError, match="no keys there"):
        command("data", words[0], tmp_path / "rows.csv", "--site", tmp_path, *words[1:])
    assert not (tmp_path / "keys").exists()
