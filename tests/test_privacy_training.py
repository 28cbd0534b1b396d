"""A private run from end to end. Tests are named after the claims of docs/privacy-model.md that they hold."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message
from private_sites import pld, records_of, site_in, task_of
from safetensors.torch import save_file
from toy import PLANTED
from toy import network as toy_network
from typer.testing import CliRunner

from fedmed import config as run_file
from fedmed.cli import app
from fedmed.errors import BudgetExhausted, DataError, ModelError, PolicyRefused
from fedmed.federated.admission import privacy_in
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, run_on
from fedmed.federated.sites import virtual_sites
from fedmed.privacy.planning import plan_training
from fedmed.training.site import Site
from fedmed.training.site_round import evaluate_round, site_card, train_round

PRIVATE = {"mode": "dp-sgd", "epsilon": 3.0}
NOISED = {**PRIVATE, "noise-multiplier": 1.66}  # what ε = 3 comes to, given, as finding it takes a second


def run_of(toy_config, **sections):
    sections = {"privacy": NOISED, **sections}
    train = {"rounds": 3, "batch-size": 32, "learning-rate": 0.5, **sections.pop("train", {})}
    return toy_config("a-400", server="server-60", train=train, **sections)


def train(config, site: Site, round: int = 1, **changes):
    return train_round(task_of(config, "train", round, **changes), site)


@pytest.fixture(scope="module")
def finished(toy_config, tmp_path_factory):
    """A private run of two sites over forked workers: (result, run folder)."""
    config = toy_config(
        "a-400", "b-600", server="server-60", privacy=PRIVATE,
        train={"rounds": 3, "batch-size": 32, "learning-rate": 0.5},
    )  # fmt: skip
    folder = RunFolder.create(tmp_path_factory.mktemp("private") / "run", config)
    with local_grid(config, folder) as grid:
        return run_on(grid, config, folder, lambda event: None), folder.path


def test_p13_the_epsilon_in_the_result_is_the_one_that_another_accountant_finds(finished):
    result, _ = finished
    assert result["status"] == "completed"
    for site in result["sites"]:
        said = site["privacy"]
        truth = pld(said["events"], said["delta"])
        assert truth <= said["epsilon"] <= truth + 0.015
        assert said["epsilon"] <= 3.0
        assert said["epsilon_total"] == said["epsilon"] and said["accountant_total"] == said["accountant"] == "prv"
        assert (said["unit"], said["adjacency"]) == ("patient", "add or remove one patient")


def test_p04_every_step_of_every_round_is_counted(finished):
    result, _ = finished
    steps = {site["site"]: sum(event["steps"] for event in site["privacy"]["events"]) for site in result["sites"]}
    assert steps == {"a-400": 3 * 5, "b-600": 3 * 8}  # passes of 160 and 240 training patients by batches of 32


def test_p07_p08_nothing_of_the_patients_leaves_beside_the_noised_weights(finished):
    result, folder = finished
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    received = [event for event in events if event["kind"] == "update_received"]
    assert len(received) == 6
    assert all(event["loss"] is None and "metrics" not in event for event in received)
    assert all(event["epsilon"] <= 3.0 for event in received)
    assert all(site["metrics"] == {} and site["images"] is None for site in result["sites"])
    assert result["server"]["metrics"]["auroc"]["value"] is not None  # the server's own patients


def test_p08_a_site_sends_no_metric_even_if_it_is_asked_for_one(toy_config, tmp_path):
    config, site = run_of(toy_config, evaluate={"sites": "every"}), site_in(tmp_path)
    update = train(config, site, evaluate=True)
    assert not update.metrics
    assert set(update.facts) >= {"patients", "steps", "privacy"}
    assert not {"loss", "seconds"} & set(update.facts)
    assert update.num_examples == update.facts["patients"] == 160
    asked = task_of(config, "evaluate", 3)
    answer = evaluate_round(asked, site)
    assert "seconds" not in answer.facts
    assert not answer.metrics and answer.num_examples == 40, "of patients held out, and not of their 80 images"
    card = site_card(asked, site)
    assert (card["patients"], card["images"], card["unreadable"], card["reasons"]) == (200, 200, 0, "")


def test_p05_the_runs_seed_repeats_nothing(toy_config, tmp_path):
    config = run_of(toy_config)
    first, second = (train(config, site_in(tmp_path / name)).weights.parameters for name in "ab")
    assert (first != second).any()


def test_p05_insecure_noise_repeats_and_voids_epsilon(toy_config, tmp_path):
    config = run_of(toy_config, privacy={**NOISED, "noise": "insecure-test"})
    first, second = (train(config, site_in(tmp_path / name)) for name in "ab")
    assert (first.weights.parameters == second.weights.parameters).all()
    said = privacy_in(first.facts)
    assert said["epsilon"] is None and "predicted" in said["void"]
    with pytest.raises(PolicyRefused, match="simulation"):
        train(config, site_in(tmp_path / "c", virtual=False))


def test_p14_a_round_that_is_trained_again_is_charged_again(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path)
    for round in (1, 2, 2, 3):
        update = train(config, site, round)
    said = privacy_in(update.facts)
    assert said["events"][0]["steps"] == 4 * 5
    assert said["epsilon"] > 3.0
    assert said["epsilon_total"] > said["epsilon"] and said["accountant_total"] == "rdp"


def test_p14_a_run_that_is_resumed_for_more_rounds_has_one_account_and_all_are_charged(toy_config, tmp_path):
    site = site_in(tmp_path)
    for round in (1, 2):
        train(run_of(toy_config), site, round)
    longer = run_of(toy_config, train={"rounds": 5}, strategy={"min-sites": 2})
    for round in (3, 4, 5):
        said = privacy_in(train(longer, site, round).facts)
    assert sum(event["steps"] for event in said["events"]) == 5 * 5
    charges = records_of(site).balance.charges.values()
    assert len({charge.run for charge in charges}) == 1
    reserved = [sum(event.steps for event in charge.events) for charge in charges]
    assert [steps for steps in reserved if steps] == [3 * 5, 5, 5]
    assert (said["accountant"], said["accountant_total"]) == ("prv", "rdp")
    assert said["epsilon"] < said["epsilon_total"], "more schedules than one add up by the filter"


def test_p03_patients_who_change_in_the_midst_of_a_run_are_charged_on_their_own_terms(toy_config, tmp_path):
    config = run_of(toy_config)
    train(config, site_in(tmp_path))
    fewer = site_in(tmp_path, manifest=Path("a-200"))  # every second patient is gone, so each is drawn twice as often
    said = privacy_in(train(config, fewer, 2).facts)
    assert {event["sample_rate"]: event["steps"] for event in said["events"]} == {0.2: 3 * 5, 0.4: 3}
    truth = pld(said["events"], said["delta"])
    assert truth <= said["epsilon"] <= truth + 0.015
    assert said["epsilon_total"] > said["epsilon"], "the whole schedule of those who are left is reserved"
    again = privacy_in(train(config, site_in(tmp_path), 3).facts)
    assert {event["sample_rate"]: event["steps"] for event in again["events"]} == {0.2: 2 * 5, 0.4: 2 * 3}


def test_p03_an_update_that_the_server_refuses_has_been_released_all_the_same(toy_config, simulate):
    config = run_of(toy_config, strategy={"max-update-norm": 1e-6})
    result, _ = simulate(config)
    assert result["status"] == "paused" and result["rounds"] == 0
    assert [event["steps"] for event in result["sites"][0]["privacy"]["events"]] == [5]


def test_p03_a_round_whose_reply_was_lost_is_in_the_result(toy_config, tmp_path):
    config = run_of(toy_config, strategy={"min-sites": 1, "lost-after": 0})
    config = config.model_copy(update={"data": config.data.model_copy(update={"sites": ("a-400", "b-400")})})
    folder = RunFolder.create(tmp_path / "run", config)
    with local_grid(config, folder) as grid:
        pull = grid.pull_messages

        def losing(numbers):
            """What the second site sends in the last round arrives nowhere but in an error."""
            for message in pull(numbers):
                about = message.metadata
                lost = (about.group_id, about.src_node_id, about.message_type) == ("3", 2, "train")
                yield Message(Error(1), reply_to=asked[message.metadata.reply_to_message_id]) if lost else message

        asked = {}
        push = grid.push_messages

        def remembering(messages):
            messages = list(messages)
            numbers = list(push(messages))
            asked.update(zip(numbers, messages, strict=True))
            return numbers

        grid.pull_messages, grid.push_messages = losing, remembering
        result = run_on(grid, config, folder, lambda event: None)
    joined = {site["site"]: site["rounds_joined"] for site in result["sites"]}
    steps = {site["site"]: sum(event["steps"] for event in site["privacy"]["events"]) for site in result["sites"]}
    assert joined == {"a-400": 3, "b-400": 2}
    assert steps["b-400"] >= steps["a-400"] == 3 * 5


def test_p04_the_schedule_is_reserved_before_the_first_gradient(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path)
    said = privacy_in(train(config, site).facts)
    assert said["epsilon"] < said["epsilon_total"] <= 3.0
    assert said["epsilon_total"] == pytest.approx(pld([{**said["events"][0], "steps": 15}], said["delta"]), abs=0.015)


def test_p04_the_total_over_two_runs_is_the_filters_and_the_ledger_shows_the_same(toy_config, tmp_path):
    site = site_in(tmp_path)
    first = privacy_in(train(run_of(toy_config), site).facts)
    second = privacy_in(train(run_of(toy_config).model_copy(update={"name": "another"}), site).facts)
    assert (first["accountant_total"], second["accountant_total"]) == ("prv", "rdp")
    whole = {**second["events"][0], "steps": 2 * 15}
    assert second["epsilon_total"] > pld([whole], second["delta"]) + 0.015, "PRV would say less, and is no bound here"
    assert records_of(site).spent.epsilon == second["epsilon_total"]


def test_a_site_and_a_dry_run_name_the_layers_that_are_slow_to_clip(toy_config, tmp_path, capsys):
    config = run_of(toy_config, model={"name": "toy:heavy", "width": 1})
    train(config, site_in(tmp_path, "[policy.privacy]\nstable-ids = true\n", virtual=False))
    assert "gradients of Heavy are made patient by patient, which is slow" in capsys.readouterr().err
    (tmp_path / "run.toml").write_text(run_file.to_toml(config))
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "run.toml"), "--dry-run"])
    assert "gradients of Heavy are made patient by patient" in done.stdout


def test_p02_the_stricter_of_run_and_site_wins(toy_config, tmp_path):
    policy = "[policy.privacy]\nepsilon = 1.0\nstable-ids = true\n"
    free = privacy_in(train(run_of(toy_config), site_in(tmp_path / "a")).facts)
    strict = privacy_in(train(run_of(toy_config, privacy=PRIVATE), site_in(tmp_path / "b", policy)).facts)
    assert strict["events"][0]["noise_multiplier"] > free["events"][0]["noise_multiplier"]
    assert strict["epsilon_total"] <= 1.0


def test_p02_in_one_run_every_site_keeps_to_an_epsilon_of_its_own(toy_config, simulate, tmp_path, monkeypatch):
    limits = {"a-400": 1.0, "b-400": 2.5, "c-400": 8.0}
    for name, limit in limits.items():
        (tmp_path / f"{name}.toml").write_text(f"[policy.privacy]\nepsilon = {limit}\nstable-ids = true\n")

    def ruled_apart(*given):
        """The virtual hospitals, each under a policy of its own, as hospitals with a site.toml each are."""
        return tuple(
            replace(site, oversight=replace(site.oversight, policy=tmp_path / f"{site.name}.toml"))
            for site in virtual_sites(*given)
        )

    monkeypatch.setattr("fedmed.federated.sites.virtual_sites", ruled_apart)
    result, _ = simulate(
        toy_config(
            *limits, privacy={**PRIVATE, "epsilon": 4.0}, train={"rounds": 2, "batch-size": 32, "local-steps": 3}
        )
    )
    assert result["status"] == "completed"
    said = {site["site"]: site["privacy"] for site in result["sites"]}
    for name, limit in limits.items():
        truth = pld(said[name]["events"], said[name]["delta"])
        assert truth <= said[name]["epsilon"] <= min(truth + 0.015, limit, 4.0)
        assert said[name]["epsilon"] > 0.95 * min(limit, 4.0), "and the noise is no larger than it has to be"
    noise = [said[name]["events"][0]["noise_multiplier"] for name in limits]
    assert noise == sorted(set(noise), reverse=True)


def test_p02_both_epsilons_are_at_the_delta_that_is_said(toy_config, tmp_path):
    site = site_in(tmp_path, "[policy.privacy]\nepsilon = 6.0\nstable-ids = true\n")
    said = privacy_in(train(run_of(toy_config, privacy={**PRIVATE, "delta": 1e-9}), site).facts)
    assert said["delta"] == 1e-9
    reserved = [{**event, "steps": 15} for event in said["events"]]
    assert said["epsilon_total"] == pytest.approx(pld(reserved, 1e-9), abs=0.015)


def test_p02_by_images_the_budget_is_the_patients_and_the_noise_is_the_plans(toy_config, tmp_path):
    rules = '[policy.privacy]\nepsilon = 3.0\nunit = "image"\nstable-ids = true\n'
    given = {**PRIVATE, "unit": "image", "images-per-patient": 2}
    said = privacy_in(train(run_of(toy_config, privacy=given), site_in(tmp_path, rules)).facts)
    plan = plan_training(
        patients=160, images_per_patient=2, unit="image", epsilon=3.0, delta=1e-6, rounds=3, batch_size=32
    )
    assert said["events"][0]["noise_multiplier"] == plan.noise_multiplier
    assert said["epsilon"] == plan.schedule[0].epsilon and said["epsilon_total"] <= 3.0
    assert (said["unit"], said["adjacency"]) == ("image", "add or remove one patient")


def test_p02_another_run_opens_no_fresh_budget(toy_config, tmp_path):
    site = site_in(tmp_path, "[policy.privacy]\nepsilon = 3.0\nstable-ids = true\n")
    train(run_of(toy_config), site)
    for changes in ({"name": "another"}, {"seed": 8}, {"model": {"name": "toy:fragile"}}):
        values = dict(changes)
        config = run_of(toy_config, **{key: values.pop(key) for key in ("train", "model") if key in values})
        with pytest.raises(BudgetExhausted, match="epsilon"):
            train(config.model_copy(update=values), site)


def test_p02_a_hospital_without_a_ledger_takes_no_part(toy_config, tmp_path):
    site = replace(site_in(tmp_path), oversight=None, virtual=False)
    with pytest.raises(PolicyRefused, match="ledger"):
        train(run_of(toy_config), site)


def test_p13_a_private_run_on_dicom_prints_the_epsilon_that_its_events_come_to(tmp_path):
    hospitals, out = tmp_path / "hospitals", tmp_path / "run"
    assert CliRunner().invoke(app, ["data", "synth", str(hospitals), "--sites", "2", "--patients", "12"]).exit_code == 0
    assert next(hospitals.glob("site-1/images/*")).read_bytes()[128:132] == b"DICM"
    settings = {
        "model.name": "small-cnn", "model.norm": "group", "data.image-size": 32, "train.rounds": 2,
        "train.batch-size": 4, "privacy.mode": "dp-sgd", "privacy.epsilon": 6.0, "privacy.delta": 1e-3,
        "evaluate.bootstrap": 0, "simulation.workers": 2,
    }  # fmt: skip
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, ["simulate", str(hospitals / "run.toml"), *chosen, "--out", str(out)])
    assert done.exit_code == 0, done.output
    sites = json.loads((out / "result.json").read_text())["sites"]
    spent = [site["privacy"]["epsilon"] for site in sites]
    for site in sites:
        truth = pld(site["privacy"]["events"], 1e-3)
        assert truth <= site["privacy"]["epsilon"] <= min(6.0, truth + 0.015)
    assert f"ε ≤ {math.ceil(max(spent) * 100) / 100:.2f}" in done.stderr


def test_p02_a_delta_that_is_large_for_so_few_patients_is_said_by_run_and_ledger(toy_config, tmp_path):
    policy = "[policy.privacy]\nstable-ids = true\ndelta = 1e-3\n"
    site = site_in(tmp_path, policy)
    said = privacy_in(train(run_of(toy_config), site).facts)
    assert said["warning"] == "δ = 0.001 is above 1/(10·160 patients)"
    shown = CliRunner().invoke(app, ["ledger", "show", str(tmp_path)])
    assert "warning: δ = 0.001 is above 1/(10·160 patients)" in shown.output


@pytest.mark.parametrize("metrics", [0.0, 1.0])
def test_a_site_whose_patients_are_all_held_out_is_evaluated_and_does_not_train(metrics, toy_config, tmp_path):
    config = run_of(toy_config, privacy={**NOISED, "metrics-epsilon": metrics})
    site = site_in(tmp_path, withdrawn=frozenset(f"{PLANTED}-a-{number}" for number in range(200) if number % 5 < 4))
    with pytest.raises(DataError, match="no image is left to train on"):
        train(config, site)
    answer = evaluate_round(task_of(config, "evaluate", 3), site)
    said = privacy_in(answer.facts)
    assert answer.num_examples == 40 and bool(answer.metrics) == bool(metrics)
    assert len(said["events"]) == bool(metrics) and said["epsilon"] <= 1.0


@pytest.mark.parametrize("privacy", [NOISED, {"mode": "central", "noise-multiplier": 1.0}], ids=["dp-sgd", "central"])
@pytest.mark.parametrize(("freeze", "live"), [("0", True), ("1", False)])
def test_p07_batch_norm_takes_part_only_where_it_is_frozen_as_given(privacy, freeze, live, toy_config, tmp_path):
    given = toy_network(in_channels=1, outputs=2, norm="batch", width=0)
    given[1].running_mean.fill_(0.25)
    save_file(given.state_dict(), tmp_path / "given.safetensors")
    model = {"norm": "batch", "freeze": freeze, "weights": str(tmp_path / "given.safetensors")}
    config = run_of(toy_config, model=model, privacy=privacy, strategy={"weight-by": "uniform"})
    site = site_in(tmp_path, "[policy.privacy]\nstable-ids = true\nepsilon = 1e6\n")
    if live:
        with pytest.raises(ModelError, match="BatchNorm"):
            train(config, site)
        assert not records_of(site).balance.charges, "refused before anything is charged"
        return
    sent = task_of(config, "train", 1).weights
    update = train(config, site)
    assert np.array_equal(update.weights.buffers, sent.buffers) and 0.25 in sent.buffers
    assert not np.array_equal(update.weights.parameters, sent.parameters)


@pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "ditto"])
def test_algorithms_at_the_sites_work_on_noised_steps(strategy, toy_config, tmp_path):
    update = train(run_of(toy_config, strategy={"name": strategy, "min-sites": 1}), site_in(tmp_path))
    assert privacy_in(update.facts)["epsilon"] <= 3.0
    assert not update.metrics and "loss" not in update.facts


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"unit": "patient"}', "x" * 100_000, json.dumps({"epsilon": float("inf")})]
)
def test_the_server_believes_no_nonsense_about_budgets(text):
    assert privacy_in({"privacy": text}) is None
