"""What leaves a site under each form of its policy, and what it amounts to."""

from __future__ import annotations

import numpy as np
import pytest

from fedmed.errors import ConfigError, DataError, ModelError
from fedmed.metrics import (
    add_sums,
    auroc,
    classification_metrics,
    classification_sums,
    intervals_classification,
    metrics_of_released,
    released,
)

LABELS = ["effusion", "nodule"]


def site(seed: int, images: int = 120) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, 2)) < [0.4, 0.2]).astype(np.float64)
    logits = rng.normal(targets, 1.0)
    targets[rng.random((images, 2)) < 0.2] = np.nan
    return logits, targets, [f"PLANTED-{i // 2}" for i in range(images)]


def test_none_lets_nothing_leave() -> None:
    assert released("none", *site(0), in_house=True) == {}


def test_histogram_lets_the_sums_leave_that_add_up() -> None:
    parts = [released("histogram", *site(seed), in_house=False) for seed in range(3)]
    sums = add_sums(classification_sums(*site(seed)) for seed in range(3))
    assert metrics_of_released(parts, LABELS) == classification_metrics(sums, LABELS)


def test_histogram_takes_the_servers_centres() -> None:
    plain, centred = (released("histogram", *site(0), in_house=False, centres=c) for c in (None, [0.5, 0.5]))
    assert (plain["positives"] != centred["positives"]).any()
    assert plain["positives"].sum() == centred["positives"].sum()


def test_exact_lets_scores_leave_in_house_and_no_patient_id() -> None:
    parts = [released("exact", *site(seed), in_house=True) for seed in range(2)]
    metrics = metrics_of_released(parts, LABELS)
    logits, targets = (np.concatenate([site(seed)[part] for seed in range(2)]) for part in (0, 1))
    for i, label in enumerate(LABELS):
        assert metrics[f"auroc/{label}"] == auroc(logits[:, i], targets[:, i])
    whole = intervals_classification(logits, targets, ["any"] * 240, LABELS, 0, np.random.default_rng(0))
    assert metrics == {name: interval.value for name, interval in whole.items()}
    assert set(parts[0]) == {"scores", "targets", "patient"}
    assert all(values.dtype == np.float64 for values in parts[0].values())
    np.testing.assert_array_equal(parts[0]["patient"], np.repeat(np.arange(60), 2))


@pytest.mark.parametrize("logits_leave", [False, True])
def test_exact_scores_never_leave_a_hospital(logits_leave: bool) -> None:
    logits = site(0)[0] if logits_leave else np.zeros((0, 2))
    with pytest.raises(ConfigError, match="never leave a hospital"):
        released("exact", logits, logits, [""] * len(logits), in_house=False)


@pytest.mark.parametrize("centres", [None, [0.5, -9.0]])
def test_sites_of_all_forms_are_judged_together(centres: list[float] | None) -> None:
    forms = ("exact", "histogram", "none")
    parts = [released(form, *site(i), in_house=form == "exact", centres=centres) for i, form in enumerate(forms)]
    sums = add_sums(classification_sums(*site(i), centres) for i in range(2))
    assert metrics_of_released(parts, LABELS, centres) == classification_metrics(sums, LABELS)


def test_nothing_released_is_judged_undefined() -> None:
    for parts in ([], [{}, {}]):
        assert set(metrics_of_released(parts, LABELS).values()) == {None}


def test_refuses_unknown_forms_and_scores_that_cannot_be_judged() -> None:
    logits, targets, patients = site(0)
    with pytest.raises(ConfigError, match="exact, histogram, none"):
        released("all", logits, targets, patients, in_house=True)
    for form in ("exact", "histogram"):
        with pytest.raises(ModelError, match="diverged"):
            released(form, logits * np.inf, targets, patients, in_house=True)
        with pytest.raises(DataError, match="patient ids"):
            released(form, logits, targets, patients[1:], in_house=True)
