from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

from fedmed.errors import DataError, ModelError
from fedmed.metrics import GRID, label_curves, youden_threshold


def cases(images: int, labels: int, seed: int = 0, shift: float = 1.2):
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, labels)) < 0.3).astype(np.float64)
    return rng.normal(size=(images, labels)) + shift * targets, targets, [f"p{i // 2}" for i in range(images)]


def curves(logits, targets, patients, *, threshold: float = 0.5, replicates: int = 200):
    thresholds = [threshold] * logits.shape[1]
    return label_curves(logits, targets, patients, thresholds, replicates, np.random.default_rng(1))


def test_curves_are_those_of_scikit_learn() -> None:
    logits, targets, patients = cases(300, 2)
    for k, found in enumerate(curves(logits, targets, patients, replicates=0)):
        assert found.roc is not None and found.precision_recall is not None
        x, y, _ = roc_curve(targets[:, k], logits[:, k])
        assert auc(found.roc.x, found.roc.y) == pytest.approx(auc(x, y))
        recall, precision = found.precision_recall.x, found.precision_recall.y
        area = float((np.diff(recall, prepend=0) * precision).sum())
        assert area == pytest.approx(average_precision_score(targets[:, k], logits[:, k]))
        theirs = precision_recall_curve(targets[:, k], logits[:, k])
        best = {r: max(p for p, other in zip(*theirs[:2], strict=True) if other == r) for r in recall}
        assert precision == pytest.approx([best[r] for r in recall])


def test_one_threshold_counts_every_known_case_once() -> None:
    logits, targets, patients = cases(400, 1)
    targets[::7] = np.nan
    (found,) = curves(logits, targets, patients)
    known = ~np.isnan(targets[:, 0])
    called, true = logits[known, 0] >= 0.5, targets[known, 0] == 1
    by_hand = (called & true).sum(), (~called & true).sum(), (called & ~true).sum(), (~called & ~true).sum()
    assert found.confusion == by_hand
    assert found.rates["sensitivity"].value == pytest.approx(by_hand[0] / (by_hand[0] + by_hand[1]))
    for rate in found.rates.values():
        assert rate.low is not None and rate.value is not None and rate.high is not None
        assert rate.low <= rate.value <= rate.high


def test_a_band_is_where_resampled_curves_lie() -> None:
    """Against a plain loop: each resample's curve by scikit-learn, its percentiles at a few places."""
    logits, targets, _ = cases(160, 1, shift=1.0)
    patients = [str(i) for i in range(160)]
    (found,) = curves(logits, targets, patients, replicates=600)
    rng, drawn = np.random.default_rng(9), []
    for _ in range(600):
        rows = rng.integers(160, size=160)
        x, y, _ = roc_curve(targets[rows, 0], logits[rows, 0], drop_intermediate=False)
        drawn.append(np.interp(GRID, x, y))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    assert found.roc is not None and found.roc.low is not None and found.roc.high is not None
    assert np.abs(found.roc.low - low)[1:].max() < 0.06
    assert np.abs(found.roc.high - high)[1:].max() < 0.06


def test_bands_narrow_with_more_patients() -> None:
    widths = []
    for images in (80, 2000):
        (found,) = curves(*cases(images, 1))
        assert found.roc is not None and found.roc.low is not None and found.roc.high is not None
        widths.append(float((found.roc.high - found.roc.low).mean()))
    assert widths[1] < widths[0] / 2


def test_calibration_bins_hold_all_known_images_and_what_they_show() -> None:
    logits, targets, patients = cases(500, 1)
    (found,) = curves(logits, targets, patients)
    bins = found.calibration
    assert bins.images.sum() == 500 and (bins.images > 0).all()
    assert float((bins.observed * bins.images).sum()) == pytest.approx(targets.sum())
    probability = 1 / (1 + np.exp(-logits))
    assert float((bins.probability * bins.images).sum()) == pytest.approx(probability.sum())
    assert bins.low is not None and bins.high is not None and (bins.low <= bins.high + 1e-12).all()


def test_one_class_has_calibration_and_no_curves() -> None:
    (found,) = curves(np.array([[0.1], [0.4], [0.9]]), np.zeros((3, 1)), ["a", "b", "c"])
    assert found.roc is None and found.precision_recall is None
    assert found.calibration.observed.tolist() == [0.0] * len(found.calibration.images)
    assert found.rates["sensitivity"].value is None and found.rates["specificity"].value is not None


@pytest.mark.parametrize(("patients", "replicates"), [(["a"] * 40, 100), ([str(i) for i in range(40)], 0)])
def test_no_band_without_two_patients_or_without_resamples(patients, replicates) -> None:
    logits, targets, _ = cases(40, 1)
    (found,) = curves(logits, targets, patients, replicates=replicates)
    assert found.roc is not None and found.roc.low is None and found.calibration.low is None
    assert found.rates["sensitivity"].low is None


@pytest.mark.parametrize("found", [5, 0])
def test_rate_of_none_or_all_has_the_interval_of_its_patients(found: int) -> None:
    """Five of five: 0.478 to 1, by scipy's exact interval."""
    targets = np.array([[1.0]] * 10 + [[0.0]] * 30)  # five positive patients of two images each
    logits = np.where(np.arange(40) < 2 * found, 1.0, np.linspace(-1, 0, 40))[:, None]
    (shown,) = curves(logits, targets, [f"p{i // 2}" for i in range(10)] + [f"n{i}" for i in range(30)])
    expected = binomtest(found, 5).proportion_ci(method="exact")
    rate = shown.rates["sensitivity"]
    assert (rate.low, rate.high, rate.n) == (pytest.approx(expected.low), pytest.approx(expected.high), 5)
    assert shown.rates["positive-predictive-value"].n == found, "patients who were called"
    assert shown.roc is not None and shown.roc.low is None, "five patients bear no band"


def test_no_label_and_no_image_are_no_error() -> None:
    assert curves(np.zeros((3, 0)), np.zeros((3, 0)), ["a", "b", "c"]) == []
    (found,) = curves(np.zeros((0, 1)), np.zeros((0, 1)), [])
    assert found.roc is None and found.confusion == (0, 0, 0, 0)


def test_refuses_what_no_curve_can_show() -> None:
    with pytest.raises(ModelError):
        curves(np.array([[np.nan]]), np.ones((1, 1)), ["a"])
    with pytest.raises(DataError):
        curves(np.zeros((2, 1)), np.ones((2, 1)), ["a"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 60))
def test_youden_threshold_is_the_best_of_all_scores(seed: int, images: int) -> None:
    logits, targets, _ = cases(images, 1, seed)
    scores, target = np.round(logits[:, 0], 1), targets[:, 0]
    threshold = youden_threshold(scores, target)
    if target.min() == target.max():
        assert threshold is None
        return
    assert threshold is not None

    def gained(at: float) -> float:
        return float((scores[target == 1] >= at).mean() - (scores[target == 0] >= at).mean())

    assert gained(threshold) == pytest.approx(max(gained(score) for score in scores))
