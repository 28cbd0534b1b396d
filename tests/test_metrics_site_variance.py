"""The variances that a site sends of its AUROCs: what they amount to, who sends none, and what the server refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.config import TaskConfig
from fedmed.errors import UpdateRefused
from fedmed.metrics import (
    auroc_intervals,
    auroc_variances,
    clustered_auroc,
    parted_variances,
    percentiles,
    replicate,
    sums_to_send,
)
from fedmed.metrics.ranking import ranking_metrics
from fedmed.reporting import write_report
from fedmed.training.evaluate import checked_sums, intervals_from, metrics_from

LABELS = ("effusion", "nodule")
TASK = TaskConfig(labels=LABELS)
VARIANCE, GIVEN = "auroc-variance", "auroc-variance-given"


def site(seed: int, patients: int = 90, share: float = 0.4) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Three images of each patient, alike in score, and findings that go together."""
    rng = np.random.default_rng(seed)
    ill = rng.random((patients, 2)) < share
    ill[:, 1] |= ill[:, 0] & (rng.random(patients) < 0.5)
    targets = np.repeat(ill.astype(np.float64), 3, axis=0)
    logits = targets + np.repeat(rng.normal(size=(patients, 1)), 3, axis=0) + 0.5 * rng.normal(size=targets.shape)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    return logits, targets, [f"PLANTED-{row // 3}" for row in range(len(targets))]


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_each_label_has_obuchowskis_variance_and_a_single_labels_mean_has_it_too(seed: int) -> None:
    logits, targets, patients = site(seed)
    both = auroc_variances(logits, targets, patients)
    for label in range(2):
        expected = clustered_auroc(logits[:, label], targets[:, label], patients).variance
        alone = auroc_variances(logits[:, [label]], targets[:, [label]], patients)
        assert both[VARIANCE][1 + label] == expected
        np.testing.assert_allclose(alone[VARIANCE], [expected] * 2, rtol=1e-12)
    assert both[GIVEN].tolist() == [1, 1, 1]


def test_the_variance_of_the_mean_of_two_equal_labels_is_that_of_one() -> None:
    logits, targets, patients = site(3)
    twice = auroc_variances(logits[:, [0, 0]], targets[:, [0, 0]], patients)[VARIANCE]
    assert twice[0] == pytest.approx(twice[1], rel=0.03), "but for the corrections of small samples"


def test_intervals_from_what_leaves_agree_with_the_bootstrap_at_the_site() -> None:
    logits, targets, patients = site(1, patients=200)
    found = intervals_from(checked_sums(sums_to_send("histogram", logits, targets, patients), TASK), TASK, replicates=0)

    def mean(weights: np.ndarray) -> np.ndarray:
        return np.mean([ranking_metrics(logits[:, k], targets[:, k], weights).auroc for k in range(2)], axis=0)

    rng = np.random.default_rng(0)
    assert found["auroc"] == pytest.approx(percentiles(replicate(mean, patients, 1000, rng)[0]), abs=0.015)
    for k, label in enumerate(LABELS):
        drawn = percentiles(
            replicate(lambda w, k=k: ranking_metrics(logits[:, k], targets[:, k], w).auroc, patients, 1000, rng)[0]
        )
        assert found[f"auroc/{label}"] == pytest.approx(drawn, abs=0.015)


def test_a_site_with_nine_ill_patients_sends_no_variance_and_one_with_ten_does() -> None:
    for ill, given_ in ((9, 0), (10, 1)):
        targets = np.repeat(np.arange(40) < ill, 2)[:, None].astype(np.float64)
        logits = np.random.default_rng(0).normal(size=targets.shape)
        sums = sums_to_send("histogram", logits, targets, [f"{row // 2}" for row in range(80)])
        assert sums[GIVEN].tolist() == [given_] * 2
        assert (sums[VARIANCE] > 0).tolist() == [bool(given_)] * 2
        assert set(auroc_intervals(sums, ["x"])) == ({"auroc", "auroc/x"} if given_ else set())


def test_a_label_with_too_few_cases_takes_the_means_variance_with_it_and_an_undefined_one_does_not() -> None:
    logits, targets, patients = site(2)
    targets[:, 1] = 0
    assert auroc_variances(logits, targets, patients)[GIVEN].tolist() == [1, 1, 0]
    targets[:3, 1] = 1
    assert auroc_variances(logits, targets, patients)[GIVEN].tolist() == [0, 1, 0]


def test_perfect_and_hidden_orders_claim_no_certainty() -> None:
    targets = (np.arange(40) % 2)[:, None].astype(np.float64)
    patients = [str(row) for row in range(40)]
    perfect = sums_to_send("histogram", targets * 4 - 2, targets, patients)
    assert perfect[GIVEN].all() and auroc_intervals(perfect, ["x"]) == {}, "no interval of one point"
    hidden = sums_to_send("histogram", (1 + targets) * 1e-9, targets, patients)  # all in one bin
    assert auroc_intervals(hidden, ["x"])["auroc/x"] == (0.0, 1.0)


def test_nothing_leaves_with_form_none() -> None:
    assert sums_to_send("none", *site(0)) == {}


def test_variances_are_no_part_of_what_is_added_over_sites() -> None:
    sums, variances = parted_variances(sums_to_send("histogram", *site(0)))
    assert set(variances) == {VARIANCE, GIVEN} and not set(sums) & set(variances)


@pytest.mark.parametrize(
    ("name", "place", "value", "text"),
    [
        (VARIANCE, 1, np.nan, "between"),
        (VARIANCE, 1, np.inf, "between"),
        (VARIANCE, 1, -0.01, "between"),
        (VARIANCE, 0, 0.26, "between"),
        (GIVEN, 1, 0.5, "between"),
        (GIVEN, 1, 0.0, "between"),  # a variance that is said not to be given
        (VARIANCE, None, np.zeros(2), "shape"),
        (GIVEN, None, None, "incomplete"),
        ("positives", slice(0, 4096), 0.0, "fewer than 10"),
    ],
)
def test_the_server_refuses_variances_that_cannot_be(name: str, place, value, text: str) -> None:
    sums = {key: values.copy() for key, values in sums_to_send("histogram", *site(0)).items()}
    assert checked_sums(sums, TASK).keys() == sums.keys()
    if value is None:
        del sums[name]
    elif place is None:
        sums[name] = value
    else:
        sums[name][place] = value
    with pytest.raises(UpdateRefused, match=text):
        checked_sums(sums, TASK)


def test_a_site_may_send_its_sums_without_variances() -> None:
    sums, _ = parted_variances(sums_to_send("histogram", *site(0)))
    checked = checked_sums(sums, TASK)
    assert intervals_from(checked, TASK, replicates=0) == {} and metrics_from(checked, TASK)["auroc"] is not None


@pytest.mark.simulation
def test_a_run_tells_the_intervals_of_sites_that_have_enough_patients(toy_config, simulate) -> None:
    result, folder = simulate(toy_config("large-300", "small-60", train={"rounds": 1}))
    large, small = (site["metrics"] for site in result["sites"])
    for name in ("auroc", "auroc/a", "auroc/b"):
        assert 0 <= large[name]["low"] < large[name]["value"] < large[name]["high"] <= 1
        assert small[name]["value"] is not None and small[name]["low"] is None
    assert large["auprc"]["low"] is None and large["loss"]["low"] is None
    words = " ".join(write_report(folder.path).read_text().split())
    assert "the variance by patient that the site computed" in words
    assert f"{large['auroc']['low']:.3f}–{large['auroc']['high']:.3f}" in words
