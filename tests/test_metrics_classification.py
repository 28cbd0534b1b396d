"""Classification sums and metrics against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, log_loss, roc_auc_score, roc_curve

from fedmed.errors import DataError, ModelError, UpdateRefused
from fedmed.metrics import add_sums, classification_bounds, classification_metrics, classification_sums
from fedmed.metrics.histograms import bin_edges

LABELS = ["effusion", "nodule", "pneumonia"]
SENSITIVITY = "sensitivity-at-90-specificity"


def data(images: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits of a fair classifier, one third of the targets unknown, two images per patient."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, 3)) < [0.1, 0.3, 0.5]).astype(np.float32)
    logits = rng.normal(2.0 * targets - 2.0, 1.5).astype(np.float32)
    targets[rng.random((images, 3)) < 1 / 3] = np.nan
    return logits, targets, [f"patient-{i // 2}" for i in range(images)]


def empty() -> dict[str, np.ndarray]:
    return classification_sums(np.zeros((0, 3)), np.zeros((0, 3)), [])


def test_metrics_of_histograms_are_within_a_thousandth_of_the_exact_ones() -> None:
    logits, targets, patients = data()
    metrics = classification_metrics(classification_sums(logits, targets, patients), LABELS)
    exact: dict[str, list[float]] = {"auroc": [], "auprc": []}
    for i, label in enumerate(LABELS):
        known = ~np.isnan(targets[:, i])
        exact["auroc"].append(roc_auc_score(targets[known, i], logits[known, i]))
        exact["auprc"].append(average_precision_score(targets[known, i], logits[known, i]))
        assert metrics[f"auroc/{label}"] == pytest.approx(exact["auroc"][-1], abs=1e-4)
        assert metrics[f"auprc/{label}"] == pytest.approx(exact["auprc"][-1], abs=1e-3)
    assert metrics["auroc"] == pytest.approx(np.mean(exact["auroc"]), abs=1e-4)
    assert metrics["auprc"] == pytest.approx(np.mean(exact["auprc"]), abs=1e-3)


def test_auroc_is_exactly_that_of_binned_logits() -> None:
    logits, targets, patients = data(200)
    binned = np.digitize(logits.astype(np.float64), bin_edges(), right=True)
    metrics = classification_metrics(classification_sums(logits, targets, patients), LABELS)
    for i, label in enumerate(LABELS):
        known = ~np.isnan(targets[:, i])
        area = roc_auc_score(targets[known, i], binned[known, i])
        assert metrics[f"auroc/{label}"] == pytest.approx(area, abs=1e-12)


def test_auprc_is_exact_where_no_two_images_share_a_bin() -> None:
    rng = np.random.default_rng(0)
    edges = bin_edges()
    logits = rng.choice((edges[:-1] + edges[1:]) / 2, size=(500, 1), replace=False)
    targets = (rng.random((500, 1)) < 0.2).astype(np.float64)
    metrics = classification_metrics(classification_sums(logits, targets, ["a"] * 500), ["x"])
    assert metrics["auprc"] == pytest.approx(average_precision_score(targets[:, 0], logits[:, 0]), abs=1e-12)


def test_auprc_of_a_shared_bin_is_by_hand_that_of_its_middle_positive() -> None:
    # above: one positive; shared bin: two positives, one negative; middle positive: 2.5 of 3
    shared = np.linspace(*bin_edges()[4000:4002], 5)[1:4]
    logits, targets = np.array([[15.0], *shared[:, None]]), np.array([[1.0], [1.0], [0.0], [1.0]])
    metrics = classification_metrics(classification_sums(logits, targets, list("abcd")), ["x"])
    assert metrics["auprc"] == pytest.approx((1 + 2 * 2.5 / 3) / 3)


def test_loss_is_scikit_learns_over_known_entries() -> None:
    logits, targets, patients = data(200)
    known = ~np.isnan(targets)
    probabilities = 1 / (1 + np.exp(-logits[known].astype(np.float64)))
    sums = classification_sums(logits, targets, patients)
    assert classification_metrics(sums, LABELS)["loss"] == pytest.approx(log_loss(targets[known], probabilities))
    assert sums["known"] == known.sum()
    assert sums["patients"] == 100
    assert sums["images"] == 200


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_sums_over_any_partition_of_sites_equal_the_pooled_sums(site_of_patient: list[int]) -> None:
    logits, targets, patients = data(120)
    site = np.repeat(site_of_patient, 2)  # a patient's images lie at one site
    sites = [
        classification_sums(
            logits[site == s], targets[site == s], [p for p, at in zip(patients, site, strict=True) if at == s]
        )
        for s in range(4)
    ]
    pooled = classification_sums(logits, targets, patients)
    added = add_sums(sites)
    for name, values in pooled.items():
        np.testing.assert_allclose(added[name], values, rtol=1e-12)
    assert classification_metrics(added, LABELS) == pytest.approx(classification_metrics(pooled, LABELS))


@settings(deadline=None)
@given(st.permutations(range(40)))
def test_order_of_images_changes_nothing(order: list[int]) -> None:
    logits, targets, patients = data(40)
    expected = classification_sums(logits, targets, patients)
    for name, values in classification_sums(logits[order], targets[order], [patients[i] for i in order]).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-12)


@settings(deadline=None)
@given(
    arrays(np.float32, (5, 3), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    arrays(np.float32, (5, 3), elements=st.sampled_from([0.0, 1.0, np.nan])),
)
def test_metrics_are_never_nan(logits: np.ndarray, targets: np.ndarray) -> None:
    metrics = classification_metrics(classification_sums(logits, targets, list("aabcd")), LABELS)
    assert all(value is None or np.isfinite(value) for value in metrics.values())


def test_f1_brier_and_sensitivity_are_scikit_learns() -> None:
    logits, targets, patients = data()
    metrics = classification_metrics(classification_sums(logits, targets, patients), LABELS)
    bounds = classification_bounds(classification_sums(logits, targets, patients), LABELS)
    for i, label in enumerate(LABELS):
        known = ~np.isnan(targets[:, i])
        truth, scores = targets[known, i], logits[known, i].astype(np.float64)
        probability = 1 / (1 + np.exp(-scores))
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert metrics[f"f1/{label}"] == pytest.approx(f1_score(truth, probability > 0.5), abs=1e-12)
        assert metrics[f"brier/{label}"] == pytest.approx(brier_score_loss(truth, probability), abs=1e-12)
        difference = true[false <= 0.1].max() - metrics[f"{SENSITIVITY}/{label}"]
        assert 0 <= difference <= bounds[f"{SENSITIVITY}/{label}"] < 0.02
    for name in ("f1", "brier", "ece", SENSITIVITY):
        assert metrics[name] == pytest.approx(np.mean([metrics[f"{name}/{label}"] for label in LABELS]))


def test_calibration_error_equals_a_loop_over_fifteen_bins() -> None:
    logits, targets, patients = data()
    metrics = classification_metrics(classification_sums(logits, targets, patients), LABELS)
    for i, label in enumerate(LABELS):
        known = ~np.isnan(targets[:, i])
        truth, probability = (
            targets[known, i].astype(np.float64),
            1 / (1 + np.exp(-logits[known, i].astype(np.float64))),
        )
        error = 0.0
        for b in range(15):
            inside = (b / 15 <= probability) & (probability < (b + 1) / 15)
            if inside.any():
                error += inside.mean() * abs(probability[inside].mean() - truth[inside].mean())
        assert metrics[f"ece/{label}"] == pytest.approx(error, abs=1e-12)


def test_calibration_error_by_hand() -> None:
    # probabilities ½, ½, ½, ½ with one positive: |0.5 - 0.25|; the certain negative is right
    logits, targets = np.array([[0.0]] * 4 + [[-800.0]]), np.array([[1.0], [0.0], [0.0], [0.0], [0.0]])
    metrics = classification_metrics(classification_sums(logits, targets, list("abcde")), ["x"])
    assert metrics["ece"] == pytest.approx(4 / 5 * 0.25)
    assert metrics["brier"] == pytest.approx(4 / 5 * 0.25)
    assert metrics["f1"] == 0  # probability ½ is not above ½


def test_probability_one_belongs_to_the_last_bin_of_calibration() -> None:
    metrics = classification_metrics(classification_sums(np.array([[900.0]]), np.array([[0.0]]), ["a"]), ["x"])
    assert metrics["ece"] == metrics["brier"] == 1.0


def test_f1_without_a_positive_is_undefined() -> None:
    metrics = classification_metrics(classification_sums(np.ones((2, 1)), np.zeros((2, 1)), ["a", "b"]), ["x"])
    assert metrics["f1"] is None
    assert metrics["brier"] is not None


def test_site_without_images_has_no_metric() -> None:
    assert set(classification_metrics(empty(), LABELS).values()) == {None}


def test_label_with_one_class_is_undefined_and_left_out_of_the_mean() -> None:
    logits = np.array([[1.0, 1.0], [-1.0, 2.0]])
    metrics = classification_metrics(classification_sums(logits, np.array([[1.0, 0.0], [0.0, 0.0]]), ["a", "b"]), "xy")
    assert metrics["auroc/y"] is metrics["auprc/y"] is None
    assert metrics["auroc"] == metrics["auroc/x"] == 1.0


def test_logits_beyond_the_last_bin_are_tied() -> None:
    sums = classification_sums(np.array([[17.0], [99.0]]), np.array([[1.0], [0.0]]), ["a", "b"])
    assert classification_metrics(sums, ["x"])["auroc"] == 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_a_network_that_has_diverged(value: float) -> None:
    with pytest.raises(ModelError, match="diverged"):
        classification_sums(np.array([[value]]), np.array([[1.0]]), ["a"])


def test_refuses_what_does_not_belong_together() -> None:
    one = np.ones((1, 1))
    with pytest.raises(DataError, match="expected the same"):
        classification_sums(one, np.ones((2, 1)), ["a"])
    with pytest.raises(DataError, match="2 patient ids for 1 images"):
        classification_sums(one, one, ["a", "b"])
    with pytest.raises(DataError, match="0 or 1 or NaN"):
        classification_sums(one, 0.5 * one, ["a"])
    with pytest.raises(DataError, match="2 label names for 1"):
        classification_metrics(classification_sums(one, one, ["a"]), ["x", "y"])


def test_adding_changes_no_site_and_nothing_is_an_empty_sum() -> None:
    sums = classification_sums(*data(10))
    before = {name: values.copy() for name, values in sums.items()}
    added = add_sums([sums, sums])
    added["loss"] += 1
    assert add_sums([]) == {}
    assert all((sums[name] == before[name]).all() for name in sums)


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"loss": np.array([np.nan])}, "non-finite"),
        ({"known": np.array([-1.0])}, "negative"),
        ({"loss": np.zeros(2)}, "shape"),
        ({"bonus": np.zeros(1)}, "expected"),
    ],
)
def test_refuses_forged_sums_from_the_first_site_on(forged: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UpdateRefused, match=message):
        add_sums([empty(), classification_sums(*data(4)) | forged])
