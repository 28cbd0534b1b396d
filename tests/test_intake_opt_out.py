"""Who withdraws between two rounds is gone in the next one, whatever the site has kept of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_hospitals import hospital

from fedmed import config as run_file
from fedmed.errors import DataError
from fedmed.federated.sites import site_of
from fedmed.intake.opt_out import opted_out
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.models import build
from fedmed.privacy.keys import make_keys
from fedmed.training.network import FlatNetwork
from fedmed.training.site import settings_for_sites, site_data
from fedmed.training.site_round import site_card, train_round
from fedmed.types import Task


def site(folder: Path, patients: int = 10) -> tuple[Path, Pseudonyms]:
    """A hospital as deployed, with decoded images kept on disk, whose manifest holds pseudonyms."""
    keys = Pseudonyms(keys=make_keys(folder / "keys"))
    manifest = hospital(folder / "data", patients, seed=1)
    header, *lines = manifest.read_text().splitlines()
    cells = [line.partition(",") for line in lines]
    manifest.write_text("\n".join([header, *(f"{keys.patient(first)},{rest}" for first, _, rest in cells)]) + "\n")
    (folder / "withdrawn.csv").write_text("patient_id\n")
    (folder / "site.toml").write_text(
        'name = "north"\nmanifest = "data/manifest.csv"\nopt-out = "withdrawn.csv"\ncache-dir = "cache"\n'
        'networks = ["toy:network"]\n'
    )
    return folder / "site.toml", keys


def a_task(round: int) -> Task:
    config = run_file.validate(
        {
            "model": {"name": "toy:network"}, "task": {"labels": ["a", "b"]}, "data": {"image-size": 8},
            "train": {"optimizer": "sgd", "batch-size": 4}, "evaluate": {"site-share": 0.3},
        }
    )  # fmt: skip
    network = FlatNetwork(build(config.model, outputs=2, seed=1), torch.device("cpu"))
    return Task(
        kind="train", round=round, settings=settings_for_sites(config), layout=network.layout.hash,
        weights=network.weights(), evaluate=False,
    )  # fmt: skip


def test_a_patient_who_withdraws_between_two_rounds_is_gone_in_the_next(tmp_path):
    path, keys = site(tmp_path, patients=30)  # keys are random: of ten, now and then one alone is held out
    node = {"site": str(path)}
    before = site_data(site_of(node, {}), a_task(1).settings)
    first = train_round(a_task(1), site_of(node, {}))
    trained = sorted({before.patients[row] for row in np.flatnonzero(~before.evaluation)})
    held = sorted({before.patients[row] for row in np.flatnonzero(before.evaluation)})
    numbers = {keys.patient(f"p{number}"): f"p{number}" for number in range(30)}
    with (tmp_path / "withdrawn.csv").open("a") as file:
        file.write(f"{numbers[trained[0]]}\n{held[0]}\n")  # one by the hospital's own id, one by pseudonym
    second = train_round(a_task(2), site_of(node, {}))
    after = site_data(site_of(node, {}), a_task(2).settings)
    assert second.facts["patients"] == first.facts["patients"] - 1 == len(trained) - 1
    assert set(after.patients) == set(before.patients) - {trained[0], held[0]}
    assert {after.patients[row] for row in np.flatnonzero(after.evaluation)} == set(held[1:])  # nobody changed sides
    assert len(after.images) == len(after) == 56  # of the kept pictures, theirs are not even opened
    card = site_card(a_task(2), site_of(node, {}))
    assert (card["patients"], card["images"], card["holds-out"]) == (28, 56, True)
    assert not np.array_equal(first.weights.parameters, second.weights.parameters)


@pytest.mark.parametrize(
    ("listed", "here", "gone"),
    [
        ("78561602", "0078561602", True),
        ("0078561602", "78561602", True),
        ("0078561602", "00078561602", True),
        ("7856160", "78561602", False),
        ("A078", "A78", False),
        ("0", "000", True),
    ],
)
def test_zeros_that_a_spreadsheet_drops_keep_nobody_in(listed, here, gone, tmp_path):
    pseudonyms = Pseudonyms(keys=make_keys(tmp_path / "keys"))
    (tmp_path / "list.csv").write_text(f"patient_id\n{listed}\n")
    names = opted_out(tmp_path / "list.csv", pseudonyms)
    assert (pseudonyms.patient(here) in names, here in names) == (gone, gone)


def test_without_its_list_or_its_keys_a_site_trains_on_nobody(tmp_path):
    path, _ = site(tmp_path)
    (tmp_path / "withdrawn.csv").unlink()
    with pytest.raises(DataError, match="withdrew"):
        site_of({"site": str(path)}, {})


@pytest.mark.parametrize("text", ["p0\n", "p0\np1\n", "id\np0\n"])
def test_a_list_without_its_header_stops_the_site_instead_of_losing_a_patient(text, tmp_path):
    path, _ = site(tmp_path)
    (tmp_path / "withdrawn.csv").write_text(text)
    with pytest.raises(DataError, match='the first row names no column "patient_id"'):
        site_of({"site": str(path)}, {})


def test_where_everybody_withdrew_there_is_nothing_to_train_on(tmp_path):
    path, _ = site(tmp_path, patients=3)
    (tmp_path / "withdrawn.csv").write_text("patient_id\np0\np1\np2\n")
    with pytest.raises(DataError, match="opted out") as raised:
        train_round(a_task(1), site_of({"site": str(path)}, {}))
    assert raised.value.public == "every patient of the manifest has opted out"
