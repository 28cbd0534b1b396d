"""Data cards: nothing of fewer than ten patients leaves, and what leaves says whether sites fit each other."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedmed.cli.intake import check_data, show_feasibility, write_card
from fedmed.errors import ConfigError, DataError
from fedmed.intake.card import Card, card_of, read_card
from fedmed.intake.check import here
from fedmed.intake.feasibility import table_of, warnings_of


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "fedmed": "0.1.0", "state": "pass", "masks": False, "patients": 120, "images": 240,
        "labels": {"effusion": {"positive_patients": 37, "negative_patients": 80}},
        "patients_of": {"modality": {"DX": 117, "CR": 3}, "maker": {"Maker": 90, "Rare Maker": 9}, "photometric": {}},
        "spacing_mm": list(np.linspace(0.1, 0.2, 120)), "gap_mm": [],
    } | changes  # fmt: skip


def test_counts_are_rounded_down_to_tens_and_small_ones_are_not_named():
    card = card_of(facts())
    assert (card.patients, card.images_per_patient) == (120, 2.0)
    assert card.modalities == {"DX": 110} and card.makers == {"Maker": 90}
    assert (card.labels["effusion"].patients, card.labels["effusion"].prevalence) == (110, 0.32)
    assert card.spacing_mm == (0.11, 0.15, 0.19) and card.gap_mm is None
    assert "Rare Maker" not in card.model_dump_json()


COUNTS = st.integers(0, 60)


@given(patients=st.integers(1, 60), positive=COUNTS, negative=COUNTS, maker=COUNTS, spacings=st.integers(0, 60))
def test_no_number_of_a_card_tells_of_fewer_than_ten_patients(patients, positive, negative, maker, spacings):
    values = sorted(np.random.default_rng(spacings).uniform(0.1, 1, spacings).tolist())
    card = card_of(
        facts(
            patients=patients, images=patients, spacing_mm=values, patients_of={"maker": {"M": maker}},
            labels={"a": {"positive_patients": positive, "negative_patients": negative}},
        )
    )  # fmt: skip
    counts = [card.patients, card.labels["a"].patients, *card.makers.values()]
    assert all(count is None or (count >= 10 and count % 10 == 0) for count in counts)
    assert (card.labels["a"].prevalence is None) == (min(positive, negative) < 10)
    assert (card.makers == {}) == (maker < 10) and (card.patients is None) == (patients < 10)
    if spacings < 20:
        assert card.spacing_mm is None
    else:  # two patients at least lie beyond what is told, before it is rounded
        assert sum(value <= np.percentile(values, 10) for value in values) >= 2
    assert Card.model_validate_json(card.model_dump_json()) == card


def other(**changes: Any) -> Card:
    return card_of(facts(**changes))


def test_sites_that_fit_raise_no_warning_and_others_say_what_does_not():
    north = other()
    assert warnings_of({"north": north, "south": other()}) == []
    south = other(
        fedmed="0.2.0", state="fail", patients=30, spacing_mm=[0.6] * 30,
        patients_of={"modality": {"CT": 30}, "maker": {}, "photometric": {}},
        labels={
            "effusion": {"positive_patients": 20, "negative_patients": 10},
            "nodule": {"positive_patients": 3, "negative_patients": 27},
        },
    )  # fmt: skip
    said = " ".join(warnings_of({"north": north, "middle": north, "south": south}))
    for words in (
        "south runs fedmed 0.2.0", "south has modality CT", "south did not pass",
        'The label "nodule" is unknown at north',
        "at 70 % in south and 32 % in north", 'Of "nodule" fewer than ten', "The pixels of south (0.6 mm)",
        "south has about 30 patients",
    ):  # fmt: skip
        assert words in said
    assert "north did" not in said
    lines = {line[0]: line[1:] for line in table_of({"north": north, "south": south})}
    assert lines["label nodule"] == ["no column", "of 30"] and lines["patients"] == ["120", "30"]


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", '{"kind": "site card"}', other().model_dump_json().replace('"patients":120', '"patients":7'),
        other().model_dump_json().replace("0.1.0", "\\u001b[31m"), other().model_dump_json()[:-1] + ',"names":["x"]}',
    ],
)  # fmt: skip
def test_what_is_no_card_is_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(DataError, match="no card"):
        read_card(tmp_path / "card.json")


def hospital(folder: Path, patients: int = 24) -> Path:
    """A site whose manifest, file names and other columns hold what must not leave."""
    folder.mkdir()
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_id", "image", "effusion", "study_uid", "age"])
        for number in range(patients):
            name = f"PLANTED-file-{number}.png"
            pixels = np.random.default_rng(number).integers(0, 256, (30, 30), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            writer.writerow([f"PLANTED-{number}", name, number % 2, f"PLANTED-1.2.{number}", 47])
    return folder


def test_a_card_follows_a_check_of_this_very_manifest_and_names_nobody(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fedmed.intake.check.apart", here)
    site, card = hospital(tmp_path / "north"), tmp_path / "north.json"
    with pytest.raises(DataError, match="no such manifest; `fedmed data import`"):
        write_card(tmp_path, card)
    with pytest.raises(DataError, match="not checked yet"):
        write_card(site, card)
    assert check_data(site, labels=(), html=None, as_json=False)
    write_card(site, card)
    text = card.read_text()
    assert json.loads(text)["labels"]["effusion"] == {"patients": 20, "prevalence": 0.5}
    assert "PLANTED" not in text and "47" not in text and str(tmp_path) not in text
    card.with_name("south.json").write_text(text)
    capsys.readouterr()
    show_feasibility([card, card.with_name("south.json")], as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["sites"]) == ["north", "south"] and any("wide intervals" in line for line in shown["warnings"])
    card.with_name("south.json").write_text(text.replace("effusion", "\\u009b2Jeffusion"))
    show_feasibility([card, card.with_name("south.json")], as_json=False)
    shown = capsys.readouterr().out
    assert "?2Jeffusion" in shown and "\x9b" not in shown
    with pytest.raises(ConfigError, match="same file name"):
        show_feasibility([card, card], as_json=False)
    assert not check_data(site, labels=("pneumonia",), html=None, as_json=False)
    capsys.readouterr()
    write_card(site, card)
    assert "warning: the last check FAILED" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--html: there is no folder"):
        check_data(site, labels=(), html=tmp_path / "nowhere" / "check.html", as_json=False)
    (site / "manifest.csv").write_text((site / "manifest.csv").read_text() + "\n")
    with pytest.raises(DataError, match="has changed"):
        write_card(site, card)
