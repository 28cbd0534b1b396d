"""Paired differences, p-values and Holm's correction: by hand, as laws, and whether intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedmed.metrics import (
    classification_measures,
    holm,
    over_seeds,
    p_value,
    paired_difference,
    percentiles,
    replicate,
    seed_moves,
)


def test_p_value_counts_replicates_beyond_zero() -> None:
    assert p_value(np.array([-1.0, 1.0, 2.0, 3.0])) == pytest.approx(2 * 2 / 5)
    assert p_value(np.arange(1.0, 1000.0)) == pytest.approx(2 / 1000)
    assert p_value(np.zeros(9)) == 1.0
    assert p_value(np.array([np.nan, 1.0, 2.0, 3.0])) == pytest.approx(2 / 4), "undefined replicates are left out"


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0.0001, 1.0), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(q >= p for p, q in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert sorted(adjusted) == [adjusted[i] for i in order]
    assert all(q <= min(1.0, len(p_values) * p) + 1e-12 for p, q in zip(p_values, adjusted, strict=True)), "Bonferroni"


def test_replicates_are_means_over_seeds_moved_together() -> None:
    values, drawn = np.array([1.0, 3.0]), np.array([[0.0, 10.0], [1.0, 11.0]])  # two seeds, two replicates
    moves = np.array([[0.5, -0.5], [-1.0, 1.0]])
    assert over_seeds(values, drawn, moves).tolist() == [0.5 - 1, 10.5 + 2]
    assert over_seeds(values[:1], drawn[:1], seed_moves(1, 2, np.random.default_rng(0))).tolist() == [0.0, 10.0]


def test_seeds_alone_give_students_interval() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.02, 5)
    moves = seed_moves(5, 200_000, np.random.default_rng(1))
    assert np.abs(moves.sum(axis=1)).max() < 1e-12, "what all seeds share stays"
    low, high = percentiles(over_seeds(values, np.repeat(values[:, None], 200_000, axis=1), moves))
    expected = stats.t.interval(0.95, 4, values.mean(), values.std(ddof=1) / np.sqrt(5))
    assert (low, high) == pytest.approx(expected, abs=5e-4)


def test_difference_of_equals_is_zero_and_of_opposites_the_negative() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 1, 500), rng.normal(0, 1, 500)
    same = paired_difference((0.4, 0.4), (first, first))
    assert (same.value, same.low, same.high, same.p) == (0, None, None, None), "resamples that are all alike"
    one, other = paired_difference((1, 0), (first, second)), paired_difference((0, 1), (second, first))
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.p == other.p


def test_undefined_metrics_have_no_difference() -> None:
    nothing = np.full(10, np.nan)
    found = paired_difference((np.nan, 0.5), (nothing, np.zeros(10)))
    assert (found.value, found.low, found.high, found.p) == (None, None, None, None)
    half = np.where(np.arange(10) < 6, np.nan, 1.0)
    assert paired_difference((1.0, 0.5), (half, np.zeros(10))).low is None, "most replicates are undefined"


def test_equal_generators_resample_equal_patients() -> None:
    rng = np.random.default_rng(1)
    targets = (rng.random((60, 1)) < 0.4).astype(float)
    patients = [f"p{i // 2}" for i in range(60)]
    weak, strong = rng.normal(targets, 1.5), rng.normal(targets, 0.5)
    drawn = [
        replicate(classification_measures(each, targets, ["x"]).statistic, patients, 300, np.random.default_rng(3))[1]
        for each in (weak, strong, weak)
    ]
    assert np.array_equal(drawn[0], drawn[2], equal_nan=True)
    paired = paired_difference(
        tuple(roc_auc_score(targets[:, 0], scores[:, 0]) for scores in (strong, weak)), tuple(drawn[1::-1])
    )
    assert 0 < paired.low < paired.value < paired.high and paired.p < 0.05


@pytest.mark.parametrize(
    ("of_patients", "trials"), [(0.0, 1000), pytest.param(0.5, 2000, marks=pytest.mark.slow)], ids=["seeds", "both"]
)
def test_paired_test_over_five_seeds_is_right_under_no_difference(of_patients: float, trials: int) -> None:
    """Seeds move a difference whose true mean is 0: p < 0.05 one time in twenty at most, p < 0.01 one in a hundred."""
    people, replicates, found, surely, inside = 100, 400, 0, 0, 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        seeds, patients = rng.normal(size=5), of_patients * np.sqrt(people) * rng.normal(size=people)
        weights = rng.multinomial(people, np.full(people, 1 / people), replicates if of_patients else 1) / people
        drawn = seeds[:, None] + np.broadcast_to(weights @ patients, replicates)  # (5, R)
        values = seeds + patients.mean()
        moved = over_seeds(values, drawn, seed_moves(5, replicates, rng))
        test = paired_difference((values.mean(), 0.0), (moved, np.zeros(replicates)))
        found, surely, inside = found + (test.p < 0.05), surely + (test.p < 0.01), inside + (test.low <= 0 <= test.high)
    assert 0.03 <= found / trials <= 0.07
    assert surely / trials <= 0.02
    assert 0.93 <= inside / trials <= 0.97


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_paired_test_is_right_under_no_difference() -> None:
    """Two networks of equal quality on the same clustered patients: p < 0.05 about one time in twenty."""
    trials, people, found, inside = 1200, 150, 0, 0
    patients = [f"p{i // 2}" for i in range(2 * people)]
    for trial in range(trials):
        rng = np.random.default_rng(10_000 + trial)
        targets = np.repeat((rng.random(people) < 0.4).astype(float), 2)
        hard = np.repeat(rng.normal(size=people), 2)  # both networks find the same patients hard
        drawn, values = [], []
        for _ in range(2):
            scores = targets + 0.8 * hard + 0.6 * np.repeat(rng.normal(size=people), 2)
            measures = classification_measures(scores[:, None], targets[:, None], ["x"])
            place = measures.names.index("auroc")
            drawn.append(replicate(measures.statistic, patients, 600, np.random.default_rng(trial))[place])
            values.append(roc_auc_score(targets, scores))
        test = paired_difference(tuple(values), tuple(drawn))
        found += test.p < 0.05
        inside += test.low <= 0 <= test.high
    assert 0.03 <= found / trials <= 0.07
    assert 0.93 <= inside / trials <= 0.97


@pytest.mark.slow
def test_two_thousand_resamples_of_ten_thousand_cases_and_fourteen_labels() -> None:
    """The cost is what a report pays; the bound leaves room for a busy machine. See docs/compare.md."""
    import time

    from fedmed.metrics import classification_intervals

    rng = np.random.default_rng(0)
    targets = (rng.random((10_000, 14)) < rng.uniform(0.02, 0.3, 14)).astype(float)
    logits = rng.normal(targets, 1.0)
    patients = [f"p{i // 2}" for i in range(10_000)]
    start = time.process_time()
    classification_intervals(logits, targets, patients, [str(i) for i in range(14)], 2000, rng)
    assert time.process_time() - start < 10
