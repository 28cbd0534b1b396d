"""Scores of images that a site lets leave: the metrics that they amount to, and what they do not tell."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from fedmed.config import TaskConfig
from fedmed.errors import UpdateRefused
from fedmed.federated.admission import decoded_update
from fedmed.federated.site_evaluation import metrics_of_sites
from fedmed.federated.wire import encode_update
from fedmed.metrics import classification_intervals, exact_metrics, sums_to_send
from fedmed.training.evaluate import bounds_from, checked_sums, intervals_from, metrics_from
from fedmed.types import Update

LABELS = ("effusion", "nodule")
TASK = TaskConfig(labels=LABELS)


def site(seed: int, images: int = 120) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, 2)) < [0.4, 0.2]).astype(np.float64)
    logits = rng.normal(targets, 1.0).astype(np.float32)
    targets[rng.random((images, 2)) < 0.2] = np.nan
    return logits, targets, [f"PLANTED-{i // 2}" for i in range(images)]


SENT = int((~np.isnan(site(0)[1]).all(axis=1)).sum())  # images of which anything is known


def sent(seed: int = 0) -> dict[str, np.ndarray]:
    return sums_to_send("exact", *site(seed))


def test_metrics_of_scores_are_those_of_scikit_learn_with_a_bootstrap_by_patient() -> None:
    logits, targets, patients = site(0)
    sums = checked_sums(sent(), TASK)
    found = metrics_from(sums, TASK)
    for k, label in enumerate(LABELS):
        known = ~np.isnan(targets[:, k])
        assert found[f"auroc/{label}"] == pytest.approx(roc_auc_score(targets[known, k], logits[known, k]), abs=1e-12)
        assert found[f"auprc/{label}"] == pytest.approx(
            average_precision_score(targets[known, k], logits[known, k]), abs=1e-12
        )
    assert set(bounds_from(sums, TASK)) == set()
    ours = intervals_from(sums, TASK, replicates=2000)
    pooled = classification_intervals(logits, targets, patients, LABELS, 2000, np.random.default_rng(5))
    for name in ("auroc", "auroc/effusion", "brier", "ece/nodule"):
        assert ours[name] == pytest.approx((pooled[name].low, pooled[name].high), abs=0.02)  # other resamples
    assert intervals_from(sums, TASK, replicates=0) == {}


def test_neither_ids_nor_the_manifests_order_leave() -> None:
    first, second = sent(), sent()
    assert first.keys() == {"scores", "targets", "patient", "patients"}
    assert (first["scores"] != second["scores"]).any() and sorted(first["scores"]) == sorted(second["scores"])
    assert first["patient"][0] == 0 and (np.diff(np.maximum.accumulate(first["patient"])) <= 1).all()  # as they come up
    logits, _, patients = site(0)
    alike = [sums_to_send("exact", 0 * logits, np.ones_like(logits), patients)["patient"] for _ in range(3)]
    assert not all(np.array_equal(alike[0], each) for each in alike)  # not the manifest's, two by two


def test_the_same_scores_give_the_same_intervals_in_whatever_order_they_come() -> None:
    logits, targets, patients = site(0)
    for scores in (logits, np.round(logits), 0 * logits):
        found = [
            intervals_from(checked_sums(sums_to_send("exact", scores, targets, patients), TASK), TASK, replicates=50)
            for _ in range(3)
        ]
        assert found[0] and found[0] == found[1] == found[2]


def test_patients_with_large_numbers_stay_apart() -> None:
    sums = {"scores": np.zeros(3), "targets": np.zeros(3), "patient": np.array([1_500_001.0, 1_500_002.0, 1_500_003.0])}
    assert exact_metrics(sums, ["effusion"])["loss"].n == 3


def test_of_a_label_that_is_unknown_no_score_leaves() -> None:
    logits, targets, patients = site(0)
    sums = sums_to_send("exact", logits, targets, patients)
    scores, told = (sums[name].reshape(-1, 2) for name in ("scores", "targets"))
    unknown = np.isnan(targets)
    assert (scores[told == -1] == 0).all() and (told == -1).sum() == unknown[~unknown.all(axis=1)].sum()
    assert len(told) == (~unknown.all(axis=1)).sum() < len(logits)
    assert sums_to_send("exact", logits, targets * np.nan, patients) == {}
    with_it = len({patients[i] for i in np.flatnonzero(targets[:, 1] == 1)})
    few = sums_to_send("exact", logits, targets, patients, fewest=with_it + 1)
    assert (few["scores"].reshape(-1, 2)[:, 1] == 0).all() and (few["targets"].reshape(-1, 2)[:, 1] == -1).all()
    assert metrics_from(checked_sums(few, TASK), TASK)["auroc/nodule"] is None


def test_result_json_has_every_metric_with_its_interval_and_no_bound() -> None:
    update = Update(weights=None, layout="", num_examples=60, metrics=sent(), facts={})
    metrics, failed = metrics_of_sites([("a", encode_update(update))], TASK, lambda site, privacy: None, replicates=200)
    assert failed == []
    for name in ("auroc", "auprc/effusion", "loss", "f1"):
        entry = metrics["a"][name]
        assert entry.keys() == {"value", "low", "high", "n"} and entry["low"] < entry["value"] < entry["high"]
        assert entry["n"] == 60


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("scores", np.full(2 * SENT, np.nan), "not finite"),
        ("scores", np.full(2 * SENT, 1e31), "impossibly large"),
        ("scores", np.zeros(2 * SENT - 1), f"{2 * SENT - 1} scores"),
        ("targets", np.full(2 * SENT, 2.0), "none of 0, 1 and -1"),
        ("targets", np.zeros(0), "0 targets"),
        ("patient", np.arange(SENT) + 0.5, "numbered"),
        ("patient", np.full(SENT, np.nan), "numbered"),
        ("patient", np.zeros(0), "0 images"),
        ("patients", np.array([61.0]), "numbered"),
        ("patients", np.array([np.nan]), "numbered"),
        ("patients", np.array([60.0, 60.0]), "images"),
        ("names", np.zeros(1), "come as"),
    ],
)
def test_refuses_scores_that_no_site_can_have_sent(name: str, values: np.ndarray, match: str) -> None:
    update = Update(weights=None, layout="", num_examples=60, metrics={**sent(), name: values}, facts={})
    with pytest.raises(UpdateRefused, match=match):
        decoded_update(encode_update(update), TASK)


def test_refuses_more_scores_than_the_server_can_resample() -> None:
    many = {name: np.tile(values, 20_000) for name, values in sent().items()}
    with pytest.raises(UpdateRefused, match="above 2000000"):
        checked_sums(many, TASK)
