"""Metrics that leave a private site. Tests are named after the claims of docs/privacy-model.md that they hold."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as some
from kill_points import AVAILABLE, run_killed
from report_files import result, site, write_run
from sklearn.metrics import roc_auc_score

from fedmed.cli.display import interval
from fedmed.errors import ConfigError, LedgerUnusable, UpdateRefused
from fedmed.federated.admission import privacy_in
from fedmed.metrics import (
    check_noised,
    longest,
    noised_metrics,
    patient_histograms,
    patient_overlaps,
    score_cases,
)
from fedmed.metrics.histograms import bin_edges
from fedmed.models import build
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.privacy.cohort import cohort_of
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.verification import examine
from fedmed.reporting import write_model_card, write_report
from fedmed.training.evaluate import patient_vectors
from fedmed.training.network import FlatNetwork
from fedmed.training.noised_metrics import NoisedSums, clipped_sum
from fedmed.training.oversight import Oversight, permitted
from fedmed.training.site_round import Site, evaluate_round, settings_for_sites, site_data, train_round
from fedmed.types import Task

PRIVATE = {"mode": "dp-sgd", "epsilon": 3.0, "noise-multiplier": 1.66, "metrics-epsilon": 1.0}
STABLE = "[policy.privacy]\nstable-ids = true\n"
ONE = ("finding",)


def run_of(toy_config, **privacy):
    train = {"rounds": 3, "batch-size": 32, "learning-rate": 0.5}
    return toy_config("a-400", server="server-60", train=train, privacy={**PRIVATE, **privacy})


def site_in(folder: Path, policy: str | None = None, **changes) -> Site:
    folder.mkdir(exist_ok=True)
    rules = None
    if policy is not None:
        rules = folder / "site.toml"
        rules.write_text(policy)
    oversight = Oversight(policy=rules, folder=folder, keys=folder / "keys")
    values = {"name": "a-400", "manifest": Path("a-400"), "dataset": "toy:dataset", "policy": oversight}
    return Site(**{**values, "virtual": True, **changes})


def network_of(config) -> FlatNetwork:
    return FlatNetwork(build(config.model, outputs=2, seed=config.seed), torch.device("cpu"))


def task_of(config, kind: str, round: int = 3) -> Task:
    network = network_of(config)
    return Task(kind=kind, round=round, settings=settings_for_sites(config), layout=network.layout.hash,
                weights=network.weights(), evaluate=True)  # fmt: skip


def judged(config, site: Site, task: Task | None = None):
    return evaluate_round(task or task_of(config, "evaluate"), site)


def charged_metrics(site: Site) -> list:
    charges = records_of(site).balance.charges.values()
    return [event for charge in charges for event in charge.events if event.release == "metrics"]


def records_of(site: Site):
    folder = site.policy.folder
    return examine(folder, bytes.fromhex((folder / "keys" / "site.pub").read_text()))


def refusals(site: Site) -> list[str]:
    return [body["rule"] for body in (record.body for record in records_of(site).audit) if not body["allowed"]]


def pld(events, delta: float) -> float:
    """ε by dp-accounting's privacy loss distributions."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        step = PoissonSampledDpEvent(event["sample_rate"], GaussianDpEvent(event["noise_multiplier"]))
        accountant.compose(SelfComposedDpEvent(step, event["steps"]))
    return accountant.get_epsilon(delta)


def scores(rng: np.random.Generator, patients: int, spread: float = 1.0):
    """Normal scores with 30 % positives and an AUROC of .86, of patients with one image each."""
    targets = (rng.random(patients) < 0.3).astype(float)
    logits = spread * (rng.normal(size=patients) + 1.5 * targets)
    return logits[:, None], targets[:, None], [str(number) for number in range(patients)]


def under(noise: float, total: np.ndarray, patients: int, draw: np.ndarray | float = 0.0):
    return {"noised": total + noise * draw, "noise": np.array([max(noise, 1e-9)]), "patients": np.array([patients])}


# What one patient may add.


@given(
    images=some.integers(1, 30), labels=some.integers(1, 4), patients=some.integers(1, 5), seed=some.integers(0, 2**32)
)
@settings(max_examples=60, deadline=None)
def test_p08_no_patient_adds_more_than_the_bound_whatever_the_images_and_labels(images, labels, patients, seed):
    rng = np.random.default_rng(seed)
    logits = rng.choice([0.0, 1e-3, 1.0, 30.0], (images, labels)) * rng.normal(size=(images, labels))
    targets = rng.choice([0.0, 1.0, np.nan], (images, labels))
    owners = [f"p{number}" for number in rng.integers(0, patients, images)]
    vectors = patient_histograms(logits, targets, owners, [0.5] * labels)
    assert np.linalg.norm(vectors, axis=1).max() <= longest("classification", labels) * (1 + 1e-12)
    masks = (rng.random((images, labels, 4, 4)) > 0.5) & (rng.random((images, labels, 1, 1)) > 0.3)
    overlaps = patient_overlaps(score_cases(rng.normal(size=masks.shape), masks, distances=False), owners)
    assert np.linalg.norm(overlaps, axis=1).max() <= longest("segmentation", labels) * (1 + 1e-12)


def test_p08_the_bound_is_reached_so_a_smaller_one_would_understate_a_patient():
    whole = patient_histograms(np.full((3, 4), 2.0), np.ones((3, 4)), ["p"] * 3)
    assert np.linalg.norm(whole) == pytest.approx(longest("classification", 4))
    empty = np.zeros((2, 4, 3, 3))
    assert np.linalg.norm(patient_overlaps(score_cases(empty - 1, empty), ["p", "p"])) == pytest.approx(1.0)


def test_p08_a_vector_beyond_the_bound_is_clipped_and_one_within_it_is_not():
    vectors = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert clipped_sum(vectors, 1.0) == pytest.approx([0.6 + 0.3, 0.8 + 0.4])


def test_p07_p08_taking_a_patient_away_leaves_all_others_bit_identical(toy_config):
    config = run_of(toy_config)
    data = site_data(Site(name="a", manifest=Path("a-400"), dataset="toy:dataset"), settings_for_sites(config))
    rows = np.flatnonzero(data.evaluation)
    gone = data.patients[rows[0]]
    fewer = np.array([row for row in rows if data.patients[row] != gone])
    network = network_of(config)
    whole, rest = (patient_vectors(network, data, each, config.task) for each in (rows, fewer))
    assert len(rest) == len(whole) - 1
    assert np.array_equal(whole[1:], rest)


# What the sums amount to.


def test_without_noise_the_auroc_is_that_of_the_bins_and_near_that_of_the_scores():
    logits, targets, patients = scores(np.random.default_rng(1), 2000)
    centre = float(np.median(logits))
    total = patient_histograms(logits, targets, patients, [centre]).sum(axis=0)
    found = noised_metrics(under(0.0, total, 2000), "classification", ONE)["auroc/finding"]
    binned = np.searchsorted(bin_edges(centre, 16)[1:-1], logits[:, 0])
    assert found.value == pytest.approx(roc_auc_score(targets[:, 0], binned), abs=1e-9)
    assert 0 <= roc_auc_score(targets[:, 0], logits[:, 0]) - found.value < 0.015


def test_without_noise_the_dice_is_the_mean_over_patients():
    rng = np.random.default_rng(2)
    masks, logits = rng.random((6, 2, 8, 8)) > 0.5, rng.normal(size=(6, 2, 8, 8))
    cases = score_cases(logits, masks, distances=False)
    total = patient_overlaps(cases, ["a", "a", "a", "b", "b", "c"]).sum(axis=0)
    found = noised_metrics(under(0.0, total, 3), "segmentation", ("x", "y"))
    means = [cases.dice[part].mean(axis=0) for part in (slice(0, 3), slice(3, 5), slice(5, 6))]
    assert [found["dice/x"].value, found["dice/y"].value] == pytest.approx(np.mean(means, axis=0))
    assert found["dice"].value == pytest.approx(np.mean(means))


@pytest.mark.parametrize(
    ("patients", "epsilon", "spread"), [(1000, 1.0, 0.024), (10_000, 1.0, 0.0024), (100, 4.0, 0.07)]
)
def test_noise_moves_an_auroc_by_what_the_docs_say_and_by_what_the_server_is_told(patients, epsilon, spread):
    rng = np.random.default_rng(3)
    logits, targets, owners = scores(rng, patients)
    total = patient_histograms(logits, targets, owners, [float(np.median(logits))]).sum(axis=0)
    exact = noised_metrics(under(0.0, total, patients), "classification", ONE)["auroc"].value
    noise = noise_multiplier_for(epsilon=epsilon, delta=1e-6, sample_rate=1.0, steps=1)
    found = [
        noised_metrics(under(noise, total, patients, rng.normal(size=total.size)), "classification", ONE)["auroc"]
        for _ in range(600)
    ]
    errors = np.array([each.value - exact for each in found if each.value is not None])
    assert len(errors) > 570
    assert np.std(errors) == pytest.approx(spread, rel=0.2)
    covered = np.mean(np.abs(errors) <= [each.noise for each in found if each.noise is not None])
    assert 0.92 < covered < 0.98


def test_a_class_that_noise_drowns_has_no_auroc_rather_than_a_random_one():
    rng = np.random.default_rng(4)
    logits, targets, owners = scores(rng, 100)
    total = patient_histograms(logits, targets, owners, [float(np.median(logits))]).sum(axis=0)
    noise = noise_multiplier_for(epsilon=1.0, delta=1e-6, sample_rate=1.0, steps=1)
    found = [
        noised_metrics(under(noise, total, 100, rng.normal(size=total.size)), "classification", ONE)["auroc"].value
        for _ in range(200)
    ]
    assert sum(value is None for value in found) > 150


def test_noise_moves_a_mean_dice_by_what_the_server_is_told():
    rng, noise = np.random.default_rng(5), 4.26 * longest("segmentation", 1)
    found = [
        noised_metrics(under(noise, np.array([30.0]), 100, rng.normal(size=1)), "segmentation", ONE)["dice"]
        for _ in range(2000)
    ]
    assert np.std([each.value for each in found]) == pytest.approx(0.021, rel=0.06)
    assert np.mean([abs(each.value - 0.8) <= each.noise for each in found]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    "changes",
    [{"noised": np.zeros(31)}, {"noised": np.full(32, np.nan)}, {"noise": np.zeros(1)}, {"patients": np.zeros(1)},
     {"positives": np.zeros(32)}],
    ids=["shape", "nan", "no-noise", "nobody", "further"],
)  # fmt: skip
def test_the_server_refuses_noised_sums_that_no_site_can_have_sent(changes):
    sums = {"noised": np.zeros(32), "noise": np.ones(1), "patients": np.ones(1)}
    check_noised(sums, "classification", 1)
    with pytest.raises(UpdateRefused):
        check_noised({**sums, **changes}, "classification", 1)


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
    train_round(task_of(config, "train", 1), site)
    said = privacy_in(judged(config, site).facts)
    assert {event["cohort"] for event in said["events"]} == {""}
    truth = pld(said["events"], said["delta"])
    assert truth <= said["epsilon"] <= truth + 0.015
    assert said["epsilon"] > max(pld([event], said["delta"]) for event in said["events"])


def test_p08_rounds_send_no_metric_and_the_end_sends_it_once(toy_config, tmp_path):
    config, site = run_of(toy_config), site_in(tmp_path)
    for round in (1, 2, 3):
        assert not train_round(task_of(config, "train", round), site).metrics
    assert charged_metrics(site) == []
    first, again = judged(config, site), judged(config, site)
    assert np.array_equal(first.metrics["noised"], again.metrics["noised"]), "other noise would halve the noise"
    assert len(charged_metrics(site)) == 1
    task = task_of(config, "evaluate")
    other = replace(task, weights=replace(task.weights, parameters=task.weights.parameters + 1))
    assert not judged(config, site, other).metrics
    assert len(charged_metrics(site)) == 1
    assert refusals(site) == ["metrics.once"]


def test_p08_metrics_that_the_budget_does_not_allow_stay_and_the_training_goes_on(toy_config, tmp_path):
    site = site_in(tmp_path, STABLE + "epsilon = 3.0\n")
    for name, leaves in (("first", True), ("second", False)):
        config = run_of(toy_config, **{"noise-multiplier": 12.0, "metrics-epsilon": 2.9})
        config = config.model_copy(update={"name": name})
        assert train_round(task_of(config, "train", 1), site).weights is not None
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
    task = task_of(config, "evaluate")
    permit = permitted(task, site.policy, config, site_data(site, task.settings))
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
