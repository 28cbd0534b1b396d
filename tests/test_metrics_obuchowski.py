"""The closed-form variance of a clustered AUROC: by hand, against DeLong's, the bootstrap, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fedmed.metrics import clustered_auroc, interval_of_variance, percentiles, replicate
from fedmed.metrics.ranking import ranking_metrics


def loop(scores: np.ndarray, targets: np.ndarray, patients: list[str]) -> tuple[float, float]:
    """AUROC and variance, pair by pair and patient by patient, as the paper's equations read."""
    kernel = lambda x, y: 1.0 if x > y else 0.5 if x == y else 0.0  # noqa: E731
    positives = [(s, p) for s, t, p in zip(scores, targets, patients, strict=True) if t == 1]
    negatives = [(s, p) for s, t, p in zip(scores, targets, patients, strict=True) if t == 0]
    m, n = len(positives), len(negatives)
    v10 = [(np.mean([kernel(x, y) for y, _ in negatives]), p) for x, p in positives]
    v01 = [(np.mean([kernel(x, y) for x, _ in positives]), p) for y, p in negatives]
    area = float(np.mean([v for v, _ in v10]))
    s10 = s01 = s11 = 0.0
    for name in dict.fromkeys(patients):
        a = sum(v - area for v, p in v10 if p == name)
        b = sum(v - area for v, p in v01 if p == name)
        s10, s01, s11 = s10 + a * a, s01 + b * b, s11 + a * b
    i10, i01 = len({p for _, p in positives}), len({p for _, p in negatives})
    i = len({p for _, p in positives} | {p for _, p in negatives})
    s10, s01, s11 = s10 * i10 / ((i10 - 1) * m), s01 * i01 / ((i01 - 1) * n), s11 * i / (i - 1)
    return area, s10 / m + s01 / n + 2 * s11 / (m * n)


def test_by_hand() -> None:
    """Patients a (3+, 2-), b (1+, 0-), c (2+): positives 3, 1, 2; negatives 2, 0.

    V10 = 1, 1/2, 3/4 and V01 = 1/2, 1, so θ = 3/4. a = 1/4, -1/4, 0 and b = -1/4, 1/4, 0 for the three patients.
    S10 = 3 / (2·3) · 1/8 = 1/16, S01 = 2 / (1·2) · 1/8 = 1/8, S11 = 3/2 · (-1/8) = -3/16.
    var = 1/48 + 1/16 - 2 · 3/16 / 6 = 1/48.
    """
    scores, targets = np.array([3.0, 2.0, 1.0, 0.0, 2.0]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    found = clustered_auroc(scores, targets, ["a", "a", "b", "b", "c"])
    assert found.value == pytest.approx(3 / 4)
    assert found.variance == pytest.approx(1 / 48)
    assert found.influence == pytest.approx([1 / 12 - 1 / 8, -1 / 12 + 1 / 8, 0])
    assert (found.positives, found.negatives) == (3, 2)


@given(st.integers(0, 10_000))
def test_equals_the_equations_pair_by_pair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 24
    targets = (rng.random(count) < 0.5).astype(float)
    targets[:4] = [1, 1, 0, 0]
    scores = np.round(rng.normal(targets, 1.0) * 3) / 3  # with ties
    patients = ["p", "q", "r", "s", *(f"{i}" for i in rng.integers(9, size=count - 4))]
    area, variance = loop(scores, targets, patients)
    found = clustered_auroc(scores, targets, patients)
    assert found.value == pytest.approx(area) == roc_auc_score(targets, scores)
    assert found.variance == pytest.approx(max(variance, 0.0), abs=1e-12)
    assert found.influence.sum() == pytest.approx(0, abs=1e-9)


def test_one_image_each_is_delongs_variance() -> None:
    rng = np.random.default_rng(0)
    targets = np.repeat([1.0, 0.0], [30, 50])
    scores = rng.normal(targets, 1.0)
    wins = (scores[:30, None] > scores[None, 30:]).astype(float)  # (30, 50)
    delong = np.var(wins.mean(axis=1), ddof=1) / 30 + np.var(wins.mean(axis=0), ddof=1) / 50
    found = clustered_auroc(scores, targets, [str(i) for i in range(80)])
    assert found.variance == pytest.approx(delong, rel=1e-12)


def test_unknown_targets_and_single_classes() -> None:
    nothing = clustered_auroc(np.array([1.0, 2.0]), np.array([1.0, np.nan]), ["a", "b"])
    assert np.isnan(nothing.value) and np.isnan(nothing.variance) and nothing.negatives == 0
    few = clustered_auroc(np.array([1.0, 2.0, 0.0]), np.array([1.0, 1.0, 0.0]), ["a", "b", "c"])
    assert few.value == 1 and np.isnan(few.variance), "one negative patient says nothing of negative patients"


def test_agrees_with_the_bootstrap_of_patients() -> None:
    rng = np.random.default_rng(4)
    people = 200
    targets = np.repeat((rng.random(people) < 0.4).astype(float), 3)
    scores = targets + np.repeat(rng.normal(size=people), 3) + 0.5 * rng.normal(size=3 * people)
    patients = [f"p{i // 3}" for i in range(3 * people)]
    found = clustered_auroc(scores, targets, patients)
    low, high = interval_of_variance(found.value, found.variance)
    drawn = percentiles(replicate(lambda w: ranking_metrics(scores, targets, w).auroc, patients, 2000, rng)[0])
    assert (low, high) == pytest.approx(drawn, abs=0.012)
    naive = clustered_auroc(scores, targets, [str(i) for i in range(3 * people)])
    assert found.variance > 1.8 * naive.variance, "images of a patient are no patients"


def test_interval_stays_within_zero_and_one() -> None:
    low, high = interval_of_variance(0.97, 0.01)
    assert 0 < low < 0.97 < high < 1
    assert interval_of_variance(1.0, 0.0) == (1.0, 1.0)


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say() -> None:
    trials, people, covered = 1500, 150, 0
    patients = [f"p{i // 3}" for i in range(3 * people)]
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        targets = np.repeat((rng.random(people) < 0.4).astype(float), 3)
        shared = np.repeat(rng.normal(size=people), 3)
        scores = targets + np.sqrt(0.7) * shared + np.sqrt(0.3) * rng.normal(size=3 * people)
        found = clustered_auroc(scores, targets, patients)
        low, high = interval_of_variance(found.value, found.variance)
        covered += low <= 0.7602499389065233 <= high  # Φ(1 / √2)
    assert 0.93 <= covered / trials <= 0.97
