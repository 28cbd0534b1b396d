"""Noise at the server in the hospital's own ledger. Tests are named after the claims of docs/privacy-model.md."""

from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from private_sites import site_in, task_of
from typer.testing import CliRunner

from fedmed.cli import app
from fedmed.errors import BudgetExhausted
from fedmed.federated.central import ServerNoise
from fedmed.federated.run_folder import RunFolder
from fedmed.privacy.central import clip_change
from fedmed.privacy.verification import Findings, examine
from fedmed.training.reserving import SCHEDULE
from fedmed.training.site import Site
from fedmed.training.site_privacy import promised_releases
from fedmed.training.site_round import train_round

CENTRAL = {"mode": "central", "noise-multiplier": 25.0, "max-grad-norm": 0.3, "sites": 4000}
ADAPTIVE = {**CENTRAL, "clipping": "adaptive"}
BUDGETED = {**CENTRAL, "noise-multiplier": 0.0, "epsilon": 1.0}


def run_of(toy_config, **privacy):
    return toy_config("a-20", privacy={**CENTRAL, **privacy}, strategy={"weight-by": "uniform"}, train={"rounds": 3},
                      evaluate={"keep": "last"})  # fmt: skip


def train(config, site: Site, round: int):
    return train_round(task_of(config, "train", round), site)


def records_in(folder: Path) -> Findings:
    return examine(folder, bytes.fromhex((folder / "keys" / "site.pub").read_text()))


def released_in(folder: Path) -> list:
    return [event for charge in records_in(folder).balance.charges.values() for event in charge.events]


def promised_to_a_patient(events, delta: float) -> float:
    """By dp-accounting: all Gaussians together, a patient moving each by twice what the hospital does."""
    precision = sum(event.steps * (2 / event.noise_multiplier) ** 2 for event in events)
    return dp_accounting.get_epsilon_gaussian(precision**-0.5, delta)


VALUES = arrays.arrays(np.float32, 3, elements=some.floats(-8, 8, width=32))


@given(one=VALUES, other=VALUES)
@settings(max_examples=100, deadline=None)
def test_p09_a_patient_moves_the_clipped_sum_by_two_clips_at_most(one, other):
    clipped = [clip_change(change, 1.5).change.astype(float) for change in (one, other)]
    assert np.linalg.norm(clipped[0] - clipped[1]) <= 2 * 1.5


def test_p09_a_patient_can_move_the_clipped_sum_by_two_clips():
    """So the ε of a hospital that comes or goes is less than a patient's, and must not be charged as it is."""
    clipped = [clip_change(np.array([sign * 9], np.float32), 1.5).change for sign in (1, -1)]
    assert abs(clipped[0] - clipped[1])[0] == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("privacy", [CENTRAL, ADAPTIVE, BUDGETED], ids=["given", "adaptive", "budgeted"])
def test_p09_the_hospitals_ledger_holds_what_the_server_releases(privacy, toy_config, tmp_path):
    config, site = run_of(toy_config, **privacy), site_in(tmp_path, name="a-20")
    for round in (1, 2, 3):
        train(config, site, round)
    server = ServerNoise(config, RunFolder.create(tmp_path / "server", config))
    server.begin(0, parameters=10)
    for round in (1, 2, 3):
        server.released(round)
    promised = released_in(tmp_path)
    assert {replace(event, cohort="") for event in promised} == set(server.events)
    assert all(event.unit == "site" for event in promised)
    found = records_in(tmp_path)
    truth = promised_to_a_patient(promised, 1e-6)
    assert truth <= found.spent.epsilon <= truth + 0.015
    assert found.faults == ()


def test_p09_a_release_at_the_server_is_charged_before_the_round_is_trained(toy_config, tmp_path):
    config, site = (
        run_of(toy_config),
        site_in(tmp_path, "[policy.privacy]\nstable-ids = true\nepsilon = 0.1\n", name="a-20"),
    )
    with pytest.raises(BudgetExhausted, match=r"policy\.privacy\.epsilon"):
        train(config, site, 1)
    assert released_in(tmp_path) == []
    site = site_in(tmp_path, "[policy.privacy]\nstable-ids = true\nepsilon = 2.0\n", name="a-20")
    train(config, site, 1)
    assert [(charge.round, [event.steps for event in charge.events])
            for charge in records_in(tmp_path).balance.charges.values()] == [(SCHEDULE, [3]), (1, [])]  # fmt: skip


@pytest.mark.parametrize(("epsilon", "of_a_patient"), [(3.6, 7.94), (8.0, 18.63)])
def test_p09_a_hospitals_epsilon_costs_its_patients_what_the_planning_page_says(
    epsilon, of_a_patient, toy_config, tmp_path
):
    config = run_of(toy_config, **{"noise-multiplier": 0.0, "epsilon": epsilon})
    (event,) = promised_releases(config.privacy, config.train.rounds)
    assert promised_to_a_patient([replace(event, steps=3)], 1e-6) == pytest.approx(of_a_patient, abs=0.03)
    site = site_in(tmp_path, "[policy.privacy]\nstable-ids = true\n", name="a-20")
    if of_a_patient < 8:
        train(config, site, 1)
        return
    with pytest.raises(BudgetExhausted, match=r"8\.00"):
        train(config, site, 1)


def test_p09_a_round_that_is_trained_again_is_charged_again_at_the_hospital(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path, name="a-20")
    for round in (1, 2, 2, 3, 3):
        train(config, site, round)
    assert sum(event.steps for event in released_in(tmp_path)) == 5


def test_p03_noise_at_the_site_and_at_the_server_add_up_in_one_budget(toy_config, tmp_path):
    site = site_in(tmp_path, name="a-20")
    train(run_of(toy_config), site, 1)
    alone = records_in(tmp_path).spent
    own = toy_config("a-20", privacy={"mode": "dp-sgd", "noise-multiplier": 3.0}, train={"rounds": 1, "batch-size": 4})
    train(own, site, 1)
    both = records_in(tmp_path)
    assert both.spent.epsilon > alone.epsilon
    assert {event.unit for event in released_in(tmp_path)} == {"site", "patient"}


def test_p09_the_ledger_says_whose_word_a_release_rests_on(toy_config, tmp_path):
    train(run_of(toy_config), site_in(tmp_path, name="a-20"), 1)
    shown = CliRunner().invoke(app, ["ledger", "show", str(tmp_path)]).output
    assert "update by" in shown and "By server: it promised" in shown
    assert "cannot check" in shown and "saw every change without it" in shown


def test_a_hospital_of_a_simulation_with_a_policy_keeps_the_same_ledger(toy_config, simulate, tmp_path):
    (tmp_path / "site.toml").write_text("[policy.privacy]\nstable-ids = true\n")
    config = run_of(toy_config)
    ruled = config.simulation.model_copy(update={"policy": str(tmp_path / "site.toml")})
    _, folder = simulate(config.model_copy(update={"simulation": ruled}))
    (event,) = released_in(folder.path / "sites" / "a-20")
    assert (event.noise_multiplier, event.steps, event.unit) == (25.0, 3, "site")
