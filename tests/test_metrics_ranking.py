"""Exact ranking metrics against scikit-learn, with and without weights and ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from fedmed.metrics.ranking import ranking_metrics, roc_curve

# Few distinct scores, so that ties are common.
cases = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: 0 < sum(target for _, target in pairs) < len(pairs)
)


def columns(pairs: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in pairs], dtype=float), np.array([target for _, target in pairs], dtype=float)


def test_auroc_by_hand() -> None:
    # pairs (positive, negative): 3 > 1, 3 > 2, 2 > 1, 2 = 2
    assert ranking_metrics([3, 2, 1, 2], [1, 1, 0, 0]).auroc == 3.5 / 4


def test_auprc_by_hand() -> None:
    # thresholds 4: P = 1/1, R = 1/2; 3: no new positive; 2: P = 2/3, R = 1
    assert ranking_metrics([4, 3, 2], [1, 0, 1]).auprc == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)


def test_sensitivity_by_hand() -> None:
    # ten negatives allow one false positive: the threshold 8 finds 9 and 8, and 7 of the two positives at 7 and 3 not
    scores, targets = [9, 8.5, 8, 7, 7, 3, *range(-6, 1)], [1, 0, 1, 0, 1, 1, *[0] * 7]
    targets += [0]
    scores += [-7]
    assert ranking_metrics(scores, targets).sensitivity == 2 / 4


@settings(deadline=None)
@given(cases)
def test_sensitivity_equals_scikit_learns_curve(pairs: list[tuple[int, bool]]) -> None:
    scores, targets = columns(pairs)
    false, true, _ = sklearn_roc_curve(targets, scores, drop_intermediate=False)
    assert ranking_metrics(scores, targets).sensitivity == pytest.approx(true[false <= 0.1 + 1e-12].max())


@settings(deadline=None)
@given(cases)
def test_exact_metrics_equal_scikit_learns(pairs: list[tuple[int, bool]]) -> None:
    scores, targets = columns(pairs)
    assert ranking_metrics(scores, targets).auroc == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    assert ranking_metrics(scores, targets).auprc == pytest.approx(average_precision_score(targets, scores), abs=1e-12)
    for mine, theirs in zip(
        roc_curve(scores, targets), sklearn_roc_curve(targets, scores, drop_intermediate=False), strict=True
    ):
        np.testing.assert_allclose(mine, theirs)


@settings(deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_order_of_cases_changes_nothing(pairs: list[tuple[int, bool]], random: object) -> None:
    scores, targets = columns(pairs)
    random.shuffle(pairs)
    shuffled = columns(pairs)
    np.testing.assert_array_equal(ranking_metrics(scores, targets), ranking_metrics(*shuffled))


@pytest.mark.parametrize("levels", [5, 10_000])
@pytest.mark.parametrize("integer", [True, False])
def test_weighted_metrics_equal_scikit_learns(levels: int, integer: bool) -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(levels, size=60) / levels, rng.integers(2, size=60).astype(float)
    weights = rng.integers(0, 4, size=(60, 20)).astype(float) if integer else rng.random((60, 20))
    found = ranking_metrics(scores, targets, weights)
    for column, area, average, sensitivity in zip(weights.T, *found, strict=True):
        false, true, _ = sklearn_roc_curve(targets, scores, sample_weight=column, drop_intermediate=False)
        assert sensitivity == pytest.approx(true[false <= 0.1 + 1e-12].max(), abs=1e-12)
        assert area == pytest.approx(roc_auc_score(targets, scores, sample_weight=column), abs=1e-12)
        assert average == pytest.approx(average_precision_score(targets, scores, sample_weight=column), abs=1e-12)


@pytest.mark.parametrize("targets", [[], [1, 1], [0, 0], [np.nan, 1], [np.nan, np.nan]])
def test_undefined_without_both_classes(targets: list[float]) -> None:
    scores = np.arange(len(targets))
    assert np.isnan(ranking_metrics(scores, targets)).all()
    assert roc_curve(scores, targets) is None


def test_unknown_targets_are_left_out() -> None:
    assert ranking_metrics([1, 9, 2, -9], [0, np.nan, 1, np.nan]).auroc == 1.0


def test_column_without_a_class_is_nan_and_spoils_no_other() -> None:
    found = ranking_metrics([1, 2], [0, 1], np.array([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(found.auroc, [1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found.auprc, [1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found.sensitivity, [1, np.nan, np.nan, np.nan])
