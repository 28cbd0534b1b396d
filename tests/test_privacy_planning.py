"""Plans of a budget: what they say is true, and nonsense is refused with the reason."""

import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedmed.cli import app
from fedmed.errors import ConfigError
from fedmed.privacy.accounting import spent
from fedmed.privacy.planning import MOST_ROWS, default_delta, plan_central, plan_training
from fedmed.types import PrivacyEvent, rounded_up

SMALL = {"patients": 400, "epsilon": 4.0, "rounds": 3, "batch_size": 40}


def run(*arguments: object):
    return CliRunner().invoke(app, ["privacy", "plan", *map(str, arguments)])


def test_p13_a_plan_spends_its_budget_and_no_more():
    made = plan_training(**SMALL)
    assert (made.sample_rate, made.steps_per_round, made.steps) == (0.1, 10, 30)
    event = PrivacyEvent(
        mechanism="sampled-gaussian", noise_multiplier=made.noise_multiplier, sample_rate=0.1, steps=30
    )
    last = made.schedule[-1]
    assert last.epsilon == spent([event], delta=made.delta).epsilon <= 4.0 < last.epsilon + 0.05
    costs = [row.epsilon for row in made.schedule]
    assert costs == sorted(costs) and [row.round for row in made.schedule] == [1, 2, 3]


def test_many_rounds_are_shown_evenly_and_the_last_always():
    made = plan_central(sites=100, epsilon=8.0, rounds=333, parameters=10)
    assert len(made.plan.schedule) == MOST_ROWS and made.plan.schedule[-1].round == 333


def test_p09_five_hospitals_and_chexnet_cannot_have_central_privacy():
    made = plan_central(sites=5, epsilon=8.0, delta=1e-5, rounds=50, parameters=6_968_206)
    assert made.plan.noise_multiplier == pytest.approx(4.2, abs=0.1)
    assert made.noise_to_clip == pytest.approx(2240, abs=20)
    assert not made.trains
    enough = plan_central(sites=made.sites_needed, epsilon=8.0, delta=1e-5, rounds=50, parameters=6_968_206)
    assert enough.trains
    assert not plan_central(
        sites=made.sites_needed - 2, epsilon=8.0, delta=1e-5, rounds=50, parameters=6_968_206
    ).trains


def test_so_much_noise_that_no_epsilon_is_left_is_a_table_and_a_huge_budget_a_warning():
    shown = run("--patients", 400, "--epsilon", 1e-9, "--rounds", 2, "--batch-size", 40)
    assert shown.exit_code == 0 and "nothing may follow it" not in shown.output
    shown = run("--patients", 400, "--epsilon", 50, "--rounds", 2, "--batch-size", 40)
    assert "warning: ε = 50 promises little" in shown.output


def test_a_plan_says_whether_anything_may_follow_it():
    """What may be added is decided by RDP, by which this plan has spent more than its ε already."""
    shown = run("--patients", 1000, "--epsilon", 8, "--rounds", 10, "--batch-size", 32)
    assert "takes this as its patients' first private run; nothing may follow it." in shown.output


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "--patients is missing"),
        (("--central",), "--sites is missing"),
        (("--patients", 100, "--sites", 5), "--sites is for --central"),
        (("--patients", 100, "--images-per-patient", 8), "--images-per-patient is for --unit image"),
        (("--patients", 100, "--plot", "nowhere/plan.svg"), "there is no folder nowhere"),
    ],
)
def test_an_option_that_is_missing_or_means_nothing_is_refused(options, line):
    refused = run(*options, "--epsilon", 3, "--rounds", 2)
    assert refused.exit_code == 1 and line in str(refused.exception)


def test_p02_default_delta_follows_the_number_of_patients():
    assert default_delta(1000) == 1e-6
    assert default_delta(10**7) == 1e-8
    assert plan_training(**SMALL).delta == 1e-6


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"delta": 1 / 400}, "at least 1/400"),
        ({"epsilon": 0.0}, "above 0"),
        ({"epsilon": -1.0}, "above 0"),
        ({"batch_size": 401}, "cannot be drawn"),
        ({"batch_size": 0}, "cannot be drawn"),
        ({"patients": 0}, "at least 1"),
        ({"rounds": 0}, "at least 1 round"),
        ({"steps_per_round": -1}, "1 step"),
        ({"unit": "image", "images_per_patient": 0}, "cannot be drawn"),
    ],
)
def test_p02_nonsense_is_refused_with_the_reason(keys, reason):
    with pytest.raises(ConfigError, match=reason):
        plan_training(**{**SMALL, **keys})


def test_p02_a_delta_above_a_tenth_of_a_patient_is_warned_of():
    (warning,) = plan_training(**{**SMALL, "delta": 1 / 3000}).warnings
    assert "1/(10 × 400 patients)" in warning
    assert plan_training(**{**SMALL, "delta": 1 / 4001}).warnings == ()


def test_p02_a_plan_by_images_charges_the_patient():
    by_image = plan_training(**SMALL, unit="image", images_per_patient=4, steps_per_round=5)
    alone = plan_training(**{**SMALL, "patients": 1600}, delta=by_image.delta, unit="image", steps_per_round=5)
    assert by_image.sample_rate == alone.sample_rate == 0.025
    assert by_image.noise_multiplier > alone.noise_multiplier


def test_the_command_prints_a_table_and_draws(tmp_path):
    for kind in ("svg", "html"):
        done = run("--patients", 400, "--epsilon", 4, "--rounds", 3, "--plot", tmp_path / f"plan.{kind}")
        assert done.exit_code == 0, done.output
    assert "noise multiplier  σ = " in done.stdout and "█" in done.stdout
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert "plotly" in (tmp_path / "plan.html").read_text()


def test_the_command_speaks_json_and_warns_on_stderr():
    done = run("--patients", 400, "--epsilon", 4, "--rounds", 3, "--delta", 1 / 3000, "--json")
    facts = json.loads(done.stdout)
    assert facts["rounds"][-1]["epsilon"] <= 4 and facts["steps"] == 75
    assert len(facts["warnings"]) == 1 and "warning: " in done.stderr


def test_p09_the_command_shows_the_noise_and_refuses_what_cannot_train():
    done = run("--central", "--sites", 5, "--epsilon", 8, "--delta", 1e-5, "--rounds", 50)
    assert "× the clip" in done.stdout
    assert isinstance(done.exception, ConfigError) and "cannot train" in str(done.exception)
    done = run("--central", "--sites", 5000, "--epsilon", 8, "--rounds", 50, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["central"]["trains"]


def test_a_plot_of_another_kind_is_refused_before_anything_is_computed(tmp_path):
    done = run("--patients", 400, "--epsilon", 4, "--rounds", 3, "--plot", tmp_path / "plan.png")
    assert isinstance(done.exception, ConfigError) and "FILE.svg" in str(done.exception)


def test_help_imports_no_accountant():
    code = "import sys, fedmed.cli; print({'torch', 'opacus', 'dp_accounting', 'scipy', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("value", "decimals", "shown"),
    [
        (1.1, 2, "1.10"),
        (1.1001, 2, "1.11"),
        (0.29, 2, "0.29"),
        (0.0, 3, "0.000"),
        (4.00001, 3, "4.001"),
        (8, 3, "8.000"),
        (math.inf, 3, "inf"),
    ],
)
def test_what_is_spent_is_never_shown_as_less_and_what_floats_add_is_not_shown(value, decimals, shown):
    assert rounded_up(value, decimals) == shown


def test_the_noise_that_a_plan_prints_keeps_its_budget():
    printed = run("--patients", 400, "--epsilon", 4, "--rounds", 3, "--batch-size", 40).stdout
    sigma = float(printed.split("σ = ")[1].split(",")[0])
    assert sigma >= plan_training(**SMALL).noise_multiplier
