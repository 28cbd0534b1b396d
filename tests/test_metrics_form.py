"""What leaves a site under each form of its policy, and what it amounts to."""

from __future__ import annotations

import numpy as np
import pytest

from fedmed.errors import ConfigError, DataError, ModelError
from fedmed.metrics import (
    add_sums,
    classification_metrics,
    classification_sums,
    parted_variances,
    sums_to_send,
)

LABELS = ["effusion", "nodule"]


def site(seed: int, images: int = 120) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, 2)) < [0.4, 0.2]).astype(np.float64)
    logits = rng.normal(targets, 1.0)
    targets[rng.random((images, 2)) < 0.2] = np.nan
    return logits, targets, [f"PLANTED-{i // 2}" for i in range(images)]


def test_none_lets_nothing_leave() -> None:
    assert sums_to_send("none", *site(0)) == {}


def test_histogram_lets_the_sums_leave_that_add_up() -> None:
    parts = [parted_variances(sums_to_send("histogram", *site(seed)))[0] for seed in range(3)]
    sums = add_sums(classification_sums(*site(seed)) for seed in range(3))
    assert classification_metrics(add_sums(parts), LABELS) == classification_metrics(sums, LABELS)


def test_histogram_takes_the_servers_centres() -> None:
    plain, centred = (sums_to_send("histogram", *site(0), centres=c) for c in (None, [0.5, 0.5]))
    assert (plain["positives"] != centred["positives"]).any()
    assert plain["positives"].sum() == centred["positives"].sum()


def test_of_a_label_that_few_patients_have_or_have_not_nothing_leaves() -> None:
    logits, targets, patients = site(0)
    with_it = len({patients[i] for i in np.flatnonzero(targets[:, 1] == 1)})
    assert sums_to_send("histogram", logits, targets, patients, fewest=with_it).keys() == (
        sums_to_send("histogram", logits, targets, patients).keys()
    )
    hidden = targets.copy()
    hidden[:, 1] = np.nan
    for name, values in sums_to_send("histogram", logits, targets, patients, fewest=with_it + 1).items():
        np.testing.assert_array_equal(values, sums_to_send("histogram", logits, hidden, patients)[name], err_msg=name)
    turned = np.where(np.isnan(targets), np.nan, 1 - targets)
    few = sums_to_send("histogram", logits, turned, patients, fewest=with_it + 1)
    assert classification_metrics(parted_variances(few)[0], LABELS)["auroc/nodule"] is None


def test_refuses_unknown_forms_and_scores_that_cannot_be_judged() -> None:
    logits, targets, patients = site(0)
    with pytest.raises(ConfigError, match="exact, histogram, none"):
        sums_to_send("all", logits, targets, patients)
    for form in ("exact", "histogram"):
        with pytest.raises(ModelError, match="diverged"):
            sums_to_send(form, logits * np.inf, targets, patients)
        with pytest.raises(DataError, match="patient ids"):
            sums_to_send(form, logits, targets, patients[1:])
