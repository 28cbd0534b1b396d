"""Histograms of scores: the bound that they state holds against scikit-learn whatever the scores, and is reached."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from fedmed.errors import DataError
from fedmed.metrics import bin_centres, classification_bounds, classification_metrics, classification_sums
from fedmed.metrics.histograms import BINS, LIMIT, bin_edges, score_histograms

SENSITIVITY = "sensitivity-at-90-specificity"


def exact(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    false, true, _ = roc_curve(targets, scores, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(targets, scores)),
        "auprc": float(average_precision_score(targets, scores)),
        SENSITIVITY: float(true[false <= 0.1 + 1e-12].max()),
    }


def from_bins(
    scores: np.ndarray, targets: np.ndarray, centre: float = 0.0
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """The metrics of one label and their bounds."""
    sums = classification_sums(scores[:, None], targets[:, None], ["any"] * len(scores), [centre])
    return classification_metrics(sums, ["x"]), classification_bounds(sums, ["x"])


def classifier(kind: str, seed: int = 0, images: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets of one label."""
    rng = np.random.default_rng(seed)
    targets = (rng.random(images) < (0.02 if kind == "rare" else 0.25)).astype(np.float64)
    noise = rng.normal(targets, 1.0)
    scores = {
        "fair": noise,
        "rare": 1.5 * noise - 4,
        "good": 4 * noise - 2,
        "tiny spread": 0.02 * noise,
        "tinier spread than a bin": 1e-6 * noise,
        "tiny spread far from the centre": 0.02 * noise - 4.5,
        "huge spread": 300 * noise,
        "skewed": np.exp(noise),
        "tied": np.round(noise),
        "constant": np.zeros(images),
        "opposite": -noise,
        "perfect": 2 * targets + 0.1 * rng.random(images),
    }
    return scores[kind], targets


FINE = ["fair", "rare", "good", "tiny spread", "skewed", "opposite", "perfect"]
COARSE = ["tinier spread than a bin", "tiny spread far from the centre", "huge spread", "tied", "constant"]


@pytest.mark.parametrize("kind", FINE + COARSE)
@pytest.mark.parametrize("seed", range(3))
def test_no_metric_is_farther_from_scikit_learns_than_its_bound(kind: str, seed: int) -> None:
    scores, targets = classifier(kind, seed)
    values, bounds = from_bins(scores, targets)
    for name, truth in exact(scores, targets).items():
        assert abs(values[name] - truth) <= bounds[name] + 1e-12


@pytest.mark.parametrize("kind", FINE)
def test_area_and_precision_are_within_a_thousandth_of_scikit_learns(kind: str) -> None:
    scores, targets = classifier(kind)
    values, bounds = from_bins(scores, targets)
    truth = exact(scores, targets)
    assert bounds["auroc"] < 1e-3
    assert values["auroc"] == pytest.approx(truth["auroc"], abs=1e-3)
    assert values["auprc"] == pytest.approx(truth["auprc"], abs=1e-3)


@pytest.mark.parametrize("deviation", [0.02, 0.1, 0.5, 2.0, 5.0])
def test_area_is_bounded_to_a_thousandth_for_any_realistic_spread(deviation: float) -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(0, deviation, 40_000), (rng.random(40_000) < 0.3).astype(np.float64)
    assert from_bins(scores, targets)[1]["auroc"] < 1e-3


def test_a_centre_brings_a_barely_trained_network_back_within_a_thousandth() -> None:
    scores, targets = classifier("tiny spread far from the centre")
    others = classifier("tiny spread far from the centre", seed=1)[0]
    truth = exact(scores, targets)
    (around_zero, wide), (centred, narrow) = (
        from_bins(scores, targets, centre) for centre in (0.0, bin_centres(others[:, None])[0])
    )
    assert wide["auroc"] > 0.05
    assert narrow["auroc"] < 1e-3
    assert abs(around_zero["auroc"] - truth["auroc"]) <= wide["auroc"]
    assert centred["auroc"] == pytest.approx(truth["auroc"], abs=1e-3)
    assert centred["auprc"] == pytest.approx(truth["auprc"], abs=1e-3)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40).filter(
        lambda cases: 0 < sum(target for _, target in cases) < len(cases)
    ),
    st.sampled_from([1e-5, 1e-4, 3e-3, 0.4, 6.0]),
)
def test_bounds_hold_for_any_order_and_any_ties_within_bins(cases: list[tuple[int, bool]], step: float) -> None:
    scores, targets = np.array([place * step for place, _ in cases]), np.array([float(target) for _, target in cases])
    values, bounds = from_bins(scores, targets)
    for name, truth in exact(scores, targets).items():
        assert abs(values[name] - truth) <= bounds[name] + 1e-12


def test_bounds_are_reached_and_so_no_smaller_one_would_hold() -> None:
    one_bin = np.linspace(*bin_edges()[4000:4002], 6)[1:5]
    best, worst = np.array([0.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])
    values, bounds = from_bins(one_bin, best)
    assert bounds == from_bins(one_bin, worst)[1]
    assert (values["auroc"], bounds["auroc"]) == (0.5, 0.5)
    # by hand: the middle positive has 1.5 of 2.5; negatives first: (1/3 + 2/4) / 2; positives first and tied: 1
    assert values["auprc"] == pytest.approx(1.5 / 2.5)
    assert bounds["auprc"] == pytest.approx(1 - 1.5 / 2.5)
    assert average_precision_score(worst, one_bin) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert average_precision_score(best, one_bin) == 1.0
    assert (values[SENSITIVITY], bounds[SENSITIVITY]) == (0, 1)  # no edge between the bin's cases, and all are in it


def test_bound_of_precision_also_covers_a_few_negatives_that_rank_above_many_positives() -> None:
    one_bin = np.linspace(*bin_edges()[4000:4002], 506)[1:505]
    targets = np.arange(504) < 500  # the four negatives score highest
    values, bounds = from_bins(one_bin, targets.astype(np.float64))
    distance = values["auprc"] - average_precision_score(targets, one_bin)
    assert distance == pytest.approx(bounds["auprc"])
    assert distance > 1 - values["auprc"]  # farther than if the positives came first


def test_bounds_of_a_mean_are_the_mean_of_the_bounds_and_undefined_where_the_metric_is() -> None:
    scores = np.stack([classifier(kind)[0] for kind in ("fair", "tied", "fair")], axis=1)
    targets = np.stack([classifier(kind)[1] for kind in ("fair", "tied", "fair")], axis=1)
    targets[:, 2] = 0
    bounds = classification_bounds(classification_sums(scores, targets, ["any"] * len(scores)), "abc")
    for name in ("auroc", "auprc", SENSITIVITY):
        assert bounds[f"{name}/c"] is None
        assert bounds[name] == pytest.approx((bounds[f"{name}/a"] + bounds[f"{name}/b"]) / 2)


@pytest.mark.parametrize("centre", [0.0, 0.5, -4.5, LIMIT])
def test_bins_cover_every_logit_and_are_finest_around_their_centre(centre: float) -> None:
    edges = bin_edges(centre)
    widths = np.diff(edges)
    assert len(widths) == BINS
    assert (widths > 0).all()
    assert edges[[0, -1]] == pytest.approx([-LIMIT, LIMIT])
    assert edges[widths.argmin()] == pytest.approx(centre, abs=1e-3)
    assert widths.min() < 3e-4


def test_bins_around_zero_mirror_each_other() -> None:
    edges = bin_edges()
    assert edges[BINS // 2] == 0
    np.testing.assert_allclose(edges, -edges[::-1], atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30))
def test_every_finite_logit_falls_into_the_bin_whose_edges_hold_it(logits: list[float]) -> None:
    column = np.array(logits)[:, None]
    counts = score_histograms(column, np.ones_like(column, dtype=bool))
    assert counts.sum() == len(logits)
    edges = bin_edges()
    edges[0], edges[-1] = -np.inf, np.inf
    by_hand = [np.flatnonzero((edges[:-1] < logit) & (logit <= edges[1:])).item() for logit in logits]
    np.testing.assert_array_equal(np.flatnonzero(counts), np.unique(by_hand))


def test_centres_are_medians_within_the_limit() -> None:
    assert bin_centres(np.array([[1.0, 90.0], [2.0, 80.0], [9.0, -3.0]])) == [2.0, LIMIT]
    assert bin_centres(np.zeros((0, 2))) == [0.0, 0.0]


@pytest.mark.parametrize("centres", [[0.0], [0.0, 17.0], [0.0, float("nan")]])
def test_refuses_centres_that_fit_no_bins(centres: list[float]) -> None:
    with pytest.raises(DataError, match="centres"):
        classification_sums(np.zeros((1, 2)), np.zeros((1, 2)), ["a"], centres)
