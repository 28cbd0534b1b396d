"""Metrics that leave a private site. Tests are named after the claims of docs/privacy-model.md that they hold."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kill_points import AVAILABLE, run_killed
from private_sites import network_of, pld, records_of, site_in, task_of
from report_files import result, site, write_run

from fedmed.cli.display import interval
from fedmed.errors import ConfigError, LedgerUnusable
from fedmed.federated.admission import privacy_in
from fedmed.metrics import (
    longest,
)
from fedmed.privacy.cohort import cohort_of
from fedmed.privacy.grid import grid_of
from fedmed.privacy.noise import SecureGenerator
from fedmed.reporting import write_model_card, write_report
from fedmed.training.evaluate import patient_vectors
from fedmed.training.noised_metrics import NoisedSums
from fedmed.training.oversight import permitted
from fedmed.training.site import Site, settings_for_sites, site_data
from fedmed.training.site_round import evaluate_round, train_round
from fedmed.types import Task

PRIVATE = {"mode": "dp-sgd", "epsilon": 3.0, "noise-multiplier": 1.66, "metrics-epsilon": 1.0}
STABLE = "[policy.privacy]\nstable-ids = true\n"


def run_of(toy_config, **privacy):
    train = {"rounds": 3, "batch-size": 32, "learning-rate": 0.5}
    return toy_config("a-400", server="server-60", train=train, privacy={**PRIVATE, **privacy})


def judged(config, site: Site, task: Task | None = None):
    return evaluate_round(task or task_of(config, "evaluate", 3, evaluate=True), site)


def charged_metrics(site: Site) -> list:
    charges = records_of(site).balance.charges.values()
    return [event for charge in charges for event in charge.events if event.release == "metrics"]


def refusals(site: Site) -> list[str]:
    return [body["rule"] for body in (record.body for record in records_of(site).audit) if not body["allowed"]]


# What a site sends, and what it costs.


def test_p08_what_leaves_is_the_clipped_sum_with_noise_of_the_size_that_it_says(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path)
    update = judged(config, site)
    assert set(update.metrics) == {"noised", "noise", "patients"}
    (event,) = charged_metrics(site)
    noise = float(update.metrics["noise"][0])
    assert noise == pytest.approx(event.noise_multiplier * longest("classification", 2))
    assert event.noise_multiplier == pytest.approx(4.26, rel=0.01), "of ε = 1 at δ = 1e-6"
    data = site_data(site, settings_for_sites(config))
    exact = patient_vectors(network_of(config), data, np.flatnonzero(data.evaluation), config.task).sum(axis=0)
    assert (update.metrics["noised"] % grid_of(noise) == 0).all(), "nothing below the noise's grid leaves"
    drawn = (update.metrics["noised"] - exact) / noise  # (2 classes · 2 labels · 16 bins,)
    assert drawn.size == 64
    assert 0.6 < np.std(drawn) < 1.5 and abs(np.mean(drawn)) < 0.6
    other = judged(config, site_in(tmp_path / "other"))
    assert not np.array_equal(update.metrics["noised"], other.metrics["noised"]), "the noise follows from no seed"


def test_p08_the_epsilon_of_a_run_holds_its_metrics_and_another_accountant_agrees(toy_config, simulate):
    config = run_of(toy_config, **{"metrics-epsilon": 4.0})
    result, folder = simulate(config)
    (site,) = result["sites"]
    said = site["privacy"]
    parts = {event["cohort"]: [] for event in said["events"]}
    for event in said["events"]:
        parts[event["cohort"]].append(event)
    assert {cohort: [event["release"] for event in events] for cohort, events in parts.items()} == {
        "": ["gradients"], "held-out": ["metrics"],
    }  # fmt: skip
    truth = {cohort: pld(events, said["delta"]) for cohort, events in parts.items()}
    assert max(truth.values()) == truth["held-out"] > truth[""], "nobody is on both sides"
    assert truth["held-out"] <= said["epsilon"] <= min(truth["held-out"] + 0.015, 4.0)
    found = site["metrics"]["auroc"]
    assert found["n"] == 40 and found["low"] is None
    assert set(site["metrics"]) == {"auroc", "auroc/a", "auroc/b"}
    assert (found["noise"] is None) is (found["value"] is None)
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert not any("metrics" in event for event in events if event["kind"] == "update_received")


def test_p08_who_may_be_on_both_sides_pays_for_both(toy_config, tmp_path):
    config = run_of(toy_config)
    site = site_in(tmp_path, "[policy.privacy]\n")  # without stable ids nobody can be told from anybody
    train_round(task_of(config, "train", 1, evaluate=True), site)
    said = privacy_in(judged(config, site).facts)
    assert {event["cohort"] for event in said["events"]} == {""}
    truth = pld(said["events"], said["delta"])
    assert truth <= said["epsilon"] <= truth + 0.015
    assert said["epsilon"] > max(pld([event], said["delta"]) for event in said["events"])


def test_p08_rounds_send_no_metric_and_the_end_sends_it_once(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path)
    for round in (1, 2, 3):
        assert not train_round(task_of(config, "train", round, evaluate=True), site).metrics
    assert charged_metrics(site) == []
    first, again = judged(config, site), judged(config, site)
    assert np.array_equal(first.metrics["noised"], again.metrics["noised"]), "other noise would halve the noise"
    assert len(charged_metrics(site)) == 1
    task = task_of(config, "evaluate", 3, evaluate=True)
    other = replace(task, weights=replace(task.weights, parameters=task.weights.parameters + 1))
    assert not judged(config, site, other).metrics
    assert len(charged_metrics(site)) == 1
    assert refusals(site) == ["metrics.once"]


def test_p08_metrics_that_the_budget_does_not_allow_stay_and_the_training_goes_on(toy_config, tmp_path):
    site = site_in(tmp_path, STABLE + "epsilon = 3.0\n")
    for name, leaves in (("first", True), ("second", False)):
        config = run_of(toy_config, **{"noise-multiplier": 12.0, "metrics-epsilon": 2.9})
        config = config.model_copy(update={"name": name})
        assert train_round(task_of(config, "train", 1, evaluate=True), site).weights is not None
        answer = judged(config, site)
        assert bool(answer.metrics) is leaves
        assert privacy_in(answer.facts)["epsilon"] is not None
    assert refusals(site) == ["policy.privacy.epsilon"]


@pytest.mark.parametrize("rule", ['form = "none"', "min-patients = 41"])
def test_p08_the_sites_own_rules_keep_noised_metrics_as_well(rule, toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path, f"{STABLE}[policy.metrics]\n{rule}\n")
    assert not judged(config, site).metrics
    assert charged_metrics(site) == [] and refusals(site) == ["policy.metrics"]


def test_p08_the_stricter_noise_of_run_and_site_wins(toy_config, tmp_path):
    for folder, policy, noise in (("a", "epsilon = 0.5\n", 8.19), ("b", "min-noise-multiplier = 6.0\n", 6.0)):
        site = site_in(tmp_path / folder, STABLE + policy)
        judged(run_of(toy_config, **{"noise-multiplier": 6.0}), site)
        assert charged_metrics(site)[0].noise_multiplier == pytest.approx(noise, rel=0.01)


def test_p08_one_patient_held_out_is_none(toy_config, tmp_path):
    site = site_in(tmp_path, manifest=Path("a-10"))
    assert not judged(run_of(toy_config), site).metrics
    assert refusals(site) == ["metrics.patients"]


def test_p08_a_logit_that_is_not_finite_is_not_told(toy_config, tmp_path):
    update = judged(run_of(toy_config), site_in(tmp_path, manifest=Path("nan-400")))
    assert np.isfinite(update.metrics["noised"]).all()


def test_metrics_without_noise_at_the_sites_are_refused_by_name(toy_config):
    for mode in ("none", "central"):
        with pytest.raises(ConfigError, match="metrics-epsilon"):
            toy_config("a-20", privacy={"mode": mode, "metrics-epsilon": 1.0}, strategy={"weight-by": "uniform"})


def test_a_noised_metric_is_marked_on_the_screen_in_the_report_and_on_the_card(tmp_path):
    found = {"value": 0.812, "low": None, "high": None, "n": 400, "noise": 0.051}
    write_run(tmp_path, result(sites=[{**site("north", 0.8), "metrics": {"auroc": found}}]))
    assert '<td class="n">± 0.051</td>' in write_report(tmp_path).read_text()
    assert "0.812 (noise ± 0.051)" in write_model_card(tmp_path).read_text()
    assert interval(found) == "0.812 (noise ± 0.051)"
    assert interval({**found, "value": None, "noise": None}) == "null (noise)"


# Killed, hurried, damaged.


def sums_of(config, site: Site) -> NoisedSums:
    task = task_of(config, "evaluate", 3, evaluate=True)
    permit = permitted(task, site.oversight, config, lambda: site_data(site, task.settings))
    cohort = cohort_of({f"p{number}": [] for number in range(40)}, permit.keys, stable_ids=True)
    return NoisedSums(
        task=task, config=config, permit=permit, form="histogram", cohort=cohort, source=SecureGenerator()
    )


def vectors() -> np.ndarray:
    return np.full((40, 64), 0.1)


def test_p08_p14_metrics_are_charged_before_a_patient_is_looked_at(toy_config, tmp_path):
    site = site_in(tmp_path)
    sums = sums_of(run_of(toy_config), site)

    def looked_at() -> np.ndarray:
        assert len(charged_metrics(site)) == 1
        return vectors()

    assert sums.of(looked_at, 40)


def test_p08_two_processes_at_once_send_the_same_numbers(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path)
    first, second = sums_of(config, site), sums_of(config, site)
    faster = {}

    def overtaken() -> np.ndarray:
        faster.update(second.of(vectors, 40))
        return vectors()

    slower = first.of(overtaken, 40)
    assert np.array_equal(faster["noised"], slower["noised"])
    assert len(charged_metrics(site)) == 2, "each had drawn noise of its own"


TRACED = pytest.mark.skipif(not AVAILABLE, reason="counts system calls of Linux on x86-64")


def killed_release(config, folder: Path, at: int | None) -> int:
    """A site that is asked for its metrics and killed at one of its writes; gives how many writes there were."""
    sums_of(config, site_in(folder))  # keys and ledger are there already

    def send() -> None:
        np.save(folder / "sent", sums_of(config, site_in(folder)).of(vectors, 40)["noised"])

    return run_killed(send, at)


def check_after_kill(config, folder: Path, at: int) -> None:
    killed_release(config, folder, at)
    site = site_in(folder)
    sums = sums_of(config, site)
    kept, charged, sent = sums.path.exists(), len(charged_metrics(site)), folder / "sent.npy"
    assert charged or not kept, "what could be sent was not charged"
    again = sums.of(vectors, 40)["noised"]
    if sent.exists() and sent.stat().st_size > again.nbytes:
        assert np.array_equal(np.load(sent), again), "two draws have left"
    more = len(charged_metrics(site)) - charged
    assert more in ((0,) if kept else (1, 2)), "every draw has a charge; the second is one that the witness alone had"


@TRACED
def test_p14_killed_at_some_writes_metrics_leave_charged_and_only_once(toy_config, tmp_path):
    config = run_of(toy_config)
    writes = killed_release(config, tmp_path / "whole", None)
    for at in range(3, writes + 1, writes // 5):
        check_after_kill(config, tmp_path / str(at), at)


@TRACED
@pytest.mark.slow
def test_p14_killed_at_every_write_metrics_leave_charged_and_only_once(toy_config, tmp_path):
    config = run_of(toy_config)
    for at in range(1, killed_release(config, tmp_path / "whole", None) + 1):
        check_after_kill(config, tmp_path / str(at), at)


def test_damaged_metrics_are_not_drawn_anew(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path)
    sums = sums_of(config, site)
    sums.of(vectors, 40)
    sums.path.write_bytes(b"rotten")
    with pytest.raises(LedgerUnusable):
        sums.of(vectors, 40)
    assert len(charged_metrics(site)) == 1
