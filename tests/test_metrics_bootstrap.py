"""Intervals against a slow loop over the same resamples, and whether they cover."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from fedmed.errors import DataError
from fedmed.federated.result import metrics_json
from fedmed.metrics import (
    Interval,
    classification_intervals,
    classification_measures,
    classification_metrics,
    classification_sums,
    percentiles,
    replicate,
    score_cases,
    segmentation_intervals,
    segmentation_metrics,
    segmentation_sums,
)

LABELS = ["effusion", "nodule"]
REPLICATES = 60


def images(count: int = 40, seed: int = 2) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits with ties, unknown targets, a rare label, and patients with one to four images in no order."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, 2)) < [0.5, 0.06]).astype(np.float64)
    logits = np.round(rng.normal(targets, 1.0) * 4) / 4
    targets[rng.random((count, 2)) < 0.2] = np.nan
    return logits, targets, [f"p{i}" for i in rng.integers(count // 2, size=count)]


def segmented(count: int = 26) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(1)
    masks = (rng.random((count, 2, 4, 4)) < 0.2).astype(np.float64)
    masks[:3, 0] = 0
    logits = rng.normal(2 * masks - 1, 1.0)
    logits[2:5, 0] = -1  # of the first label, masks are empty in truth, in both, in prediction
    return logits, masks, [f"p{i // 2}" for i in range(count)]


def resamples(patients: list[str], replicates: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the images of each resample, by hand: the same draws as the library's."""
    distinct = np.unique(patients)
    of = {name: np.flatnonzero(np.array(patients) == name) for name in distinct}
    draws = rng.integers(len(distinct), size=(replicates, len(distinct)))
    return [np.concatenate([of[distinct[i]] for i in row]) for row in draws]


def looped_ends(values: list[float | None]) -> tuple[float, float]:
    defined = [value for value in values if value is not None]
    assert 2 * len(defined) >= len(values)
    return tuple(np.percentile(defined, [2.5, 97.5]))


def sensitivity(targets: np.ndarray, logits: np.ndarray) -> float:
    false, true, _ = roc_curve(targets, logits, drop_intermediate=False)
    return true[false <= 0.1 + 1e-12].max()


def exact(logits: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """Ranking metrics by scikit-learn; the others from sums, which lose nothing of them."""
    sums = classification_sums(logits, targets, ["any"] * len(logits))
    metrics = classification_metrics(sums, LABELS)
    rankings = {"auroc": roc_auc_score, "auprc": average_precision_score, "sensitivity-at-90-specificity": sensitivity}
    for name, score in rankings.items():
        values = []
        for i, label in enumerate(LABELS):
            known = ~np.isnan(targets[:, i])
            both = len(set(targets[known, i])) == 2
            values.append(float(score(targets[known, i], logits[known, i])) if both else None)
            metrics[f"{name}/{label}"] = values[-1]
        defined = [value for value in values if value is not None]
        metrics[name] = float(np.mean(defined)) if defined else None
    return metrics


def test_classification_equals_a_loop_over_the_same_resamples() -> None:
    logits, targets, patients = images(60, 5)
    found = classification_intervals(logits, targets, patients, LABELS, REPLICATES, np.random.default_rng(5))
    looped = [exact(logits[i], targets[i]) for i in resamples(patients, REPLICATES, np.random.default_rng(5))]
    value = exact(logits, targets)
    assert list(found) == list(classification_metrics(classification_sums(logits, targets, patients), LABELS))
    assert any(each["auroc/nodule"] is None for each in looped)  # the rare label is missing in some
    measures = classification_measures(logits, targets, LABELS)
    drawn = dict(zip(found, replicate(measures.statistic, patients, REPLICATES, np.random.default_rng(5)), strict=True))
    for name, interval in found.items():
        assert interval.value == pytest.approx(value[name], abs=1e-12)
        ends = looped_ends([each[name] for each in looped])
        assert np.nanquantile(drawn[name], [0.025, 0.975]) == pytest.approx(ends, abs=1e-12)
        metric, _, label = name.partition("/")
        few = metric in ("auroc", "auprc", "sensitivity-at-90-specificity") and label != "effusion"
        assert (interval.low, interval.high) == ((None, None) if few else pytest.approx(ends, abs=1e-12)), name


def test_segmentation_equals_a_loop_over_the_same_resamples() -> None:
    logits, masks, patients = segmented()

    def metrics(chosen: np.ndarray) -> dict[str, float | None]:
        cases = score_cases(logits[chosen], masks[chosen])
        return segmentation_metrics(segmentation_sums(cases, ["any"] * len(chosen)), LABELS)

    cases = score_cases(logits, masks)
    found = segmentation_intervals(cases, patients, LABELS, REPLICATES, np.random.default_rng(5))
    looped = [metrics(chosen) for chosen in resamples(patients, REPLICATES, np.random.default_rng(5))]
    value = metrics(np.arange(len(logits)))
    true, predicted = masks.any(axis=(2, 3)), (logits > 0).any(axis=(2, 3))
    counted = {"hd95": true & predicted, "assd": true & predicted, "lesion-sensitivity": true}
    assert sorted(found) == sorted(value)
    for name, interval in found.items():
        assert interval.value == pytest.approx(value[name], abs=1e-12)
        ends = looped_ends([r[name] for r in looped])
        metric, _, label = name.partition("/")
        has = counted.get(metric, np.ones_like(true))
        of_label = has[:, LABELS.index(label)] if label else has.any(axis=1)
        assert interval.n == len({patient for patient, has_it in zip(patients, of_label, strict=True) if has_it})
        told = ends[0] < ends[1] and interval.n >= 10
        assert (interval.low, interval.high) == (pytest.approx(ends, abs=1e-12) if told else (None, None)), name


def test_memory_bound_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*images(), LABELS, REPLICATES)
    whole = classification_intervals(*arguments, np.random.default_rng(5))
    monkeypatch.setattr("fedmed.metrics.resampling.CELLS", 7 * 40)  # seven replicates at once
    assert classification_intervals(*arguments, np.random.default_rng(5)) == whole


def test_n_counts_patients_with_a_known_target() -> None:
    targets = np.array([[1.0, np.nan], [0.0, np.nan], [1.0, 1.0], [np.nan, np.nan]])
    found = classification_intervals(np.zeros((4, 2)), targets, list("aabc"), LABELS, 20, np.random.default_rng(0))
    assert {name: interval.n for name, interval in found.items()} == {
        name: 1 if name.endswith("/nodule") else 2 for name in found
    }
    assert found["auroc/nodule"] == Interval(value=None, low=None, high=None, n=1)


def test_without_replicates_there_are_values_and_no_intervals() -> None:
    for found in (
        classification_intervals(*images(), LABELS, 0, np.random.default_rng(0)),
        segmentation_intervals(score_cases(*segmented()[:2]), segmented()[2], LABELS, 0, np.random.default_rng(0)),
    ):
        assert all(i.value is not None and i.low is None and i.high is None for i in found.values())


def test_one_patient_has_no_interval() -> None:
    logits, targets, _ = images()
    found = classification_intervals(logits, targets, ["same"] * 40, LABELS, 20, np.random.default_rng(0))
    assert all(i.value is not None and i.low is None and i.n == 1 for i in found.values())


def test_no_image_has_no_value() -> None:
    nothing = np.zeros((0, 2))
    found = classification_intervals(nothing, nothing, [], LABELS, 20, np.random.default_rng(0))
    cases = score_cases(np.zeros((0, 2, 4, 4)), np.zeros((0, 2, 4, 4)))
    found |= segmentation_intervals(cases, [], LABELS, 20, np.random.default_rng(0))
    assert set(found.values()) == {Interval(value=None, low=None, high=None, n=0)}


def test_no_interval_if_fewer_than_half_of_the_replicates_are_defined() -> None:
    patients = list("abcdefghijkl")

    def undefined_without_a_and_b(weights: np.ndarray) -> np.ndarray:  # P(a and b drawn) is 0.41 of twelve
        return np.where((weights[0] > 0) & (weights[1] > 0), weights[0], np.nan)

    def undefined_without_a(weights: np.ndarray) -> np.ndarray:  # P(a drawn) is 0.65
        return np.where(weights[0] > 0, weights[0], np.nan)

    rng = np.random.default_rng(0)
    assert percentiles(replicate(undefined_without_a_and_b, patients, 2000, rng)[0]) == (None, None)
    assert percentiles(replicate(undefined_without_a, patients, 2000, rng)[0]) == (1.0, 3.0)


@pytest.mark.parametrize(("patients", "told"), [(9, False), (10, True)])
def test_few_patients_have_no_interval_of_any_metric(patients: int, told: bool) -> None:
    logits, masks, _ = segmented(2 * patients)
    ids = [f"p{i // 2}" for i in range(2 * patients)]
    rng = np.random.default_rng(0)
    found = segmentation_intervals(score_cases(logits, masks), ids, LABELS, 50, rng)
    found |= classification_intervals(logits[:, :, 0, 0], masks[:, :, 0, 0], ids, LABELS, 50, rng)
    for name in ("dice", "iou", "micro-dice", "hd95/nodule", "loss", "accuracy", "f1", "brier"):
        assert found[name].value is not None and (found[name].low is not None) == told, name


@pytest.mark.parametrize(("positives", "ranked"), [(9, False), (10, True)])
def test_ranking_of_few_patients_of_a_class_has_no_interval(positives: int, ranked: bool) -> None:
    targets = (np.arange(60) < positives).astype(float)[:, None]
    logits = np.random.default_rng(0).normal(targets, 1.0)
    found = classification_intervals(logits, targets, list(map(str, range(60))), ["x"], 50, np.random.default_rng(0))
    for name in ("auroc", "auroc/x", "auprc/x", "sensitivity-at-90-specificity"):
        assert found[name].value is not None and (found[name].low is not None) == ranked, name
    assert found["accuracy"].low is not None


def test_what_no_resample_changes_has_no_interval() -> None:
    targets = (np.arange(60) < 20).astype(float)[:, None]
    found = classification_intervals(
        targets - 0.5, targets, list(map(str, range(60))), ["x"], 50, np.random.default_rng(0)
    )
    for name in ("auroc", "auprc", "accuracy", "f1"):
        assert (found[name].value, found[name].low, found[name].high) == (1.0, None, None)


def test_same_generator_same_intervals() -> None:
    first, second = (classification_intervals(*images(), LABELS, 50, np.random.default_rng(3)) for _ in range(2))
    assert first == second


def test_refuses_other_numbers_of_patients_or_labels() -> None:
    logits, targets, patients = images()
    with pytest.raises(DataError, match="patient ids"):
        classification_intervals(logits, targets, patients[1:], LABELS, 1, np.random.default_rng(0))
    with pytest.raises(DataError, match="label names"):
        classification_intervals(logits, targets, patients, ["x"], 1, np.random.default_rng(0))
    with pytest.raises(DataError, match="label names"):
        segmentation_intervals(score_cases(*segmented()[:2]), segmented()[2], ["x"], 1, np.random.default_rng(0))


def test_intervals_over_patients_cover_where_intervals_over_images_do_not() -> None:
    patients = [f"p{i}" for i in range(30) for _ in range(4)]
    covered = {"patients": 0, "images": 0}
    for trial in range(150):
        rng = np.random.default_rng(trial)
        values = np.repeat(rng.normal(size=30), 4) + 0.3 * rng.normal(size=120)  # true mean 0

        def mean(weights: np.ndarray, values: np.ndarray = values) -> np.ndarray:
            return values @ weights / weights.sum(axis=0)

        for unit, clusters in (("patients", patients), ("images", [str(i) for i in range(120)])):
            low, high = percentiles(replicate(mean, clusters, 200, rng)[0])
            covered[unit] += low <= 0 <= high
    assert 0.88 <= covered["patients"] / 150 <= 0.99
    assert covered["images"] / 150 < 0.8


def test_a_thousand_resamples_are_no_loop_over_resamples() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((500, 4)) < 0.3).astype(np.float64)
    logits = rng.normal(targets, 1.0)
    patients = [f"p{i // 2}" for i in range(500)]
    fastest = np.inf
    for _ in range(3):
        start = time.perf_counter()
        classification_intervals(logits, targets, patients, list("abcd"), 1000, rng)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 2.5  # 0.1 s alone on one core; a loop over scikit-learn takes half a minute


def test_an_interval_is_json_whatever_its_numbers_are():
    interval = Interval(value=np.float64(0.5), low=float("nan"), high=float("inf"), n=3)
    assert interval.to_json() == {"value": 0.5, "low": None, "high": None, "n": 3}
    assert metrics_json({"auroc": interval}) == {"auroc": interval.to_json()}
