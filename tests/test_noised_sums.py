"""What one patient may add to noised metrics, and what the server makes of their sums."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from private_sites import network_of
from sklearn.metrics import roc_auc_score

from fedmed.errors import UpdateRefused
from fedmed.metrics import (
    check_noised,
    longest,
    noised_metrics,
    patient_histograms,
    patient_overlaps,
    score_cases,
)
from fedmed.metrics.histograms import bin_edges
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.training.evaluate import patient_vectors
from fedmed.training.noised_metrics import clipped
from fedmed.training.site import Site, settings_for_sites, site_data

ONE = ("finding",)


def scores(rng: np.random.Generator, patients: int, spread: float = 1.0):
    """Normal scores with 30 % positives and an AUROC of .86, of patients with one image each."""
    targets = (rng.random(patients) < 0.3).astype(float)
    logits = spread * (rng.normal(size=patients) + 1.5 * targets)
    return logits[:, None], targets[:, None], [str(number) for number in range(patients)]


def under(noise: float, total: np.ndarray, patients: int, draw: np.ndarray | float = 0.0):
    return {"noised": total + noise * draw, "noise": np.array([max(noise, 1e-9)]), "patients": np.array([patients])}


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
    assert clipped(vectors, 1.0).sum(axis=0) == pytest.approx([0.6 + 0.3, 0.8 + 0.4])


def test_p07_p08_taking_a_patient_away_leaves_all_others_bit_identical(toy_config):
    config = toy_config("a-400")
    data = site_data(Site(name="a", manifest=Path("a-400"), dataset="toy:dataset"), settings_for_sites(config))
    rows = np.flatnonzero(data.evaluation)
    gone = data.patients[rows[0]]
    fewer = np.array([row for row in rows if data.patients[row] != gone])
    network = network_of(config)
    whole, rest = (patient_vectors(network, data, each, config.task) for each in (rows, fewer))
    assert len(rest) == len(whole) - 1
    assert np.array_equal(whole[1:], rest)


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
    ("patients", "epsilon", "spread"),
    [(1000, 1.0, 0.024), (10_000, 1.0, 0.0024), (100, 4.0, 0.07), (1000, 4.0, 0.007), (10_000, 4.0, 0.0007)],
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


@pytest.mark.parametrize(("epsilon", "spread"), [(1.0, 2.1), (4.0, 0.6)])
@pytest.mark.parametrize("patients", [100, 1000, 10_000])
def test_noise_moves_a_mean_dice_by_what_the_docs_say_and_by_what_the_server_is_told(patients, epsilon, spread):
    rng, total = np.random.default_rng(5), np.array([0.3 * patients])
    noise = noise_multiplier_for(epsilon=epsilon, delta=1e-6, sample_rate=1.0, steps=1) * longest("segmentation", 1)
    found = [
        noised_metrics(under(noise, total, patients, rng.normal(size=1)), "segmentation", ONE)["dice"]
        for _ in range(2000)
    ]
    assert np.std([each.value for each in found]) == pytest.approx(spread / patients, rel=0.06)
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
