"""Segmentation scores, sums and metrics by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score, log_loss

from fedmed.errors import DataError, ModelError
from fedmed.metrics import (
    add_sums,
    join_cases,
    score_cases,
    segmentation_metrics,
    segmentation_sums,
)

LABELS = ["left lung", "right lung"]


def data(images: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits that agree with their masks more often than not."""
    rng = np.random.default_rng(seed)
    masks = (rng.random((images, 2, 6, 5)) < 0.3).astype(np.float32)
    logits = rng.normal(2 * masks - 1, 1.5).astype(np.float32)
    return logits, masks, [f"patient-{i // 2}" for i in range(images)]


def dice_of(logits: np.ndarray, masks: np.ndarray) -> np.ndarray:
    return score_cases(logits, masks, distances=False).dice


def sums_of(logits: np.ndarray, masks: np.ndarray, patients: list[str], spacing_mm=1.0) -> dict[str, np.ndarray]:
    return segmentation_sums(score_cases(logits, masks, spacing_mm), patients)


def test_dice_and_iou_equal_scikit_learns() -> None:
    logits, masks, patients = data()
    dice = dice_of(logits, masks)
    for image in range(len(logits)):
        for label in range(2):
            f1 = f1_score(masks[image, label].ravel(), logits[image, label].ravel() > 0)
            assert dice[image, label] == pytest.approx(f1, abs=1e-12)
    metrics = segmentation_metrics(sums_of(logits, masks, patients), LABELS)
    for i, label in enumerate(LABELS):
        pooled = masks[:, i].ravel(), logits[:, i].ravel() > 0
        assert metrics[f"dice/{label}"] == pytest.approx(dice[:, i].mean())
        assert metrics[f"micro-dice/{label}"] == pytest.approx(f1_score(*pooled))
        assert metrics[f"micro-iou/{label}"] == pytest.approx(jaccard_score(*pooled))
        each = [jaccard_score(masks[n, i].ravel(), logits[n, i].ravel() > 0) for n in range(len(logits))]
        assert metrics[f"iou/{label}"] == pytest.approx(np.mean(each))
    assert metrics["dice"] == pytest.approx(dice.mean())
    assert metrics["micro-dice"] == pytest.approx(f1_score(masks.ravel(), logits.ravel() > 0))
    assert metrics["micro-iou"] == pytest.approx(jaccard_score(masks.ravel(), logits.ravel() > 0))
    assert metrics["iou"] == pytest.approx(np.mean([metrics[f"iou/{label}"] for label in LABELS]))


def test_loss_is_scikit_learns_over_all_pixels() -> None:
    logits, masks, patients = data()
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    metrics = segmentation_metrics(sums_of(logits, masks, patients), LABELS)
    assert metrics["loss"] == pytest.approx(log_loss(masks.ravel(), probabilities.ravel()))


def test_dice_of_empty_masks_is_one_and_of_one_empty_mask_zero() -> None:
    nothing, something = -np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2))
    assert dice_of(nothing, np.zeros((1, 1, 2, 2))) == 1
    assert dice_of(nothing, something) == 0
    assert dice_of(something, np.zeros((1, 1, 2, 2))) == 0
    metrics = segmentation_metrics(sums_of(nothing, np.zeros((1, 1, 2, 2)), ["a"]), ["x"])
    assert [metrics[name] for name in ("dice", "micro-dice", "iou", "micro-iou")] == [1, 1, 1, 1]


def volumes() -> tuple[np.ndarray, np.ndarray]:
    """Logits and masks (5, 1, 4, 6, 6): a shifted box, a perfect one, a missed one, an invented one, and nothing."""
    masks, logits = np.zeros((5, 1, 4, 6, 6)), -np.ones((5, 1, 4, 6, 6))
    masks[0, 0, 1:3, 1:3, 1:3] = masks[1, 0, 1:3, 1:3, 1:3] = masks[2, 0, 0, 0, 0] = 1
    logits[0, 0, 1:3, 1:3, 2:4] = logits[1, 0, 1:3, 1:3, 1:3] = logits[3, 0, 3, 5, 5] = 1
    return logits, masks


def test_metrics_of_volumes_by_hand() -> None:
    sums = sums_of(*volumes(), list("aabcd"), spacing_mm=(3.0, 1.0, 0.5))
    metrics = segmentation_metrics(sums, ["x"])
    # the shifted box: half of its voxels overlap, half of both surfaces is one voxel of 0.5 mm away
    assert metrics["dice"] == pytest.approx((0.5 + 1 + 0 + 0 + 1) / 5)
    assert metrics["iou"] == pytest.approx((4 / 12 + 1 + 0 + 0 + 1) / 5)
    assert metrics["micro-dice"] == pytest.approx(2 * 12 / (16 + 16 + 1 + 1))
    assert metrics["micro-iou"] == pytest.approx(12 / 22)
    assert metrics["hd95"] == pytest.approx((0.5 + 0) / 2)
    assert metrics["assd"] == pytest.approx((0.25 + 0) / 2)
    assert metrics["hd95-excluded"] == 2  # missed, invented; the case without anything counts for no distance
    assert metrics["lesion-sensitivity"] == pytest.approx(2 / 3)
    assert metrics["lesion-false-positives"] == pytest.approx(1 / 5)
    assert (sums["measured"], sums["excluded"], sums["cases"], sums["patients"]) == (2, 2, 5, 4)


def test_spacing_may_differ_from_case_to_case() -> None:
    logits, masks = volumes()
    spacing = np.full((5, 3), 1.0)
    spacing[0, 2] = 7
    assert score_cases(logits, masks, spacing).hd95[:2, 0].tolist() == [7, 0]
    assert score_cases(logits, masks, 2).hd95[:2, 0].tolist() == [2, 0]


def test_of_a_label_that_few_patients_have_nothing_leaves() -> None:
    logits, masks = volumes()  # patients a (twice) and b have it; it was outlined in a alone
    logits = np.concatenate((logits, logits, logits), axis=1)
    masks = np.concatenate((masks, np.ones_like(masks), np.zeros_like(masks)), axis=1)
    cases, patients, labels = score_cases(logits, masks), list("aabcd"), ["rare", "common", "absent"]
    whole, some = segmentation_sums(cases, patients), segmentation_sums(cases, patients, fewest=3)
    for name, values in some.items():
        if len(values) == 1:
            assert values == whole[name]
        else:
            distances = name in ("hd95", "assd", "measured")
            common = 0 if distances else whole[name][1]
            assert values.tolist() == [0, common, whole[name][2]], name
    unchanged = segmentation_sums(cases, patients, fewest=2)
    assert unchanged["lesions"].tolist() == whole["lesions"].tolist()
    assert unchanged["hd95"][0] == unchanged["measured"][0] == 0 < whole["measured"][0], "of one patient"
    metrics = segmentation_metrics(add_sums([segmentation_sums(score_cases(logits[:0], masks[:0]), []), some]), labels)
    assert {value for name, value in metrics.items() if name.endswith("/rare")} == {None}
    assert metrics["dice"] == pytest.approx((metrics["dice/common"] + metrics["dice/absent"]) / 2)
    assert metrics["micro-dice"] == pytest.approx(2 * some["intersection"].sum() / some["total"].sum())


@pytest.mark.parametrize("spacing", [0, -1, np.nan, np.inf, (1, 1), (1, 0, 1), np.ones((4, 3))])
def test_refuses_a_spacing_that_is_none(spacing: object) -> None:
    with pytest.raises(DataError, match="spacing"):
        score_cases(*volumes(), spacing)


def test_without_distances_everything_else_stays() -> None:
    logits, masks = volumes()
    patients = list("aabcd")
    quick = segmentation_metrics(segmentation_sums(score_cases(logits, masks, distances=False), patients), ["x"])
    full = segmentation_metrics(segmentation_sums(score_cases(logits, masks), patients), ["x"])
    unmeasured = {name for name in full if name.partition("/")[0] in ("hd95", "assd")}
    assert quick == {name: None if name in unmeasured else value for name, value in full.items()}


def test_labels_are_averaged_where_defined_and_counts_are_added() -> None:
    logits, masks = volumes()
    logits, masks = np.concatenate((logits, logits), axis=1), np.concatenate((masks, np.zeros_like(masks)), axis=1)
    metrics = segmentation_metrics(sums_of(logits, masks, list("aabcd")), LABELS)
    assert metrics["hd95/right lung"] is metrics["lesion-sensitivity/right lung"] is None
    assert metrics["hd95"] == metrics["hd95/left lung"]
    assert metrics["hd95-excluded"] == metrics["hd95-excluded/left lung"] + metrics["hd95-excluded/right lung"] == 5
    assert metrics["lesion-false-positives"] == pytest.approx((1 / 5 + 3 / 5) / 2)


def test_a_logit_of_zero_is_background() -> None:
    assert dice_of(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1), dtype=bool)) == 1


def test_spread_of_the_cases_follows_from_the_sums() -> None:
    logits, masks, patients = data()
    sums = sums_of(logits, masks, patients)
    deviation = np.sqrt(sums["dice-square"] / sums["cases"] - (sums["dice"] / sums["cases"]) ** 2)
    np.testing.assert_allclose(deviation, dice_of(logits, masks).std(axis=0))
    assert sums["patients"] == 6
    assert sums["images"] == sums["known"] == 12


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_sums_over_any_partition_of_sites_equal_the_pooled_sums(site_of_patient: list[int]) -> None:
    logits, masks, patients = data()
    site = np.repeat(site_of_patient, 2)
    names = np.array(patients)
    added = add_sums(sums_of(logits[site == s], masks[site == s], names[site == s]) for s in range(3))
    for name, values in sums_of(logits, masks, patients).items():
        np.testing.assert_allclose(added[name], values, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)))
def test_order_of_images_changes_nothing(order: list[int]) -> None:
    logits, masks, patients = data()
    expected = sums_of(logits, masks, patients)
    for name, values in sums_of(logits[order], masks[order], [patients[i] for i in order]).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-12)


def test_batches_joined_are_the_whole() -> None:
    logits, masks, patients = data()
    joined = join_cases([score_cases(logits[i : i + 5], masks[i : i + 5]) for i in (0, 5, 10)])
    for name, values in sums_of(logits, masks, patients).items():
        np.testing.assert_array_equal(segmentation_sums(joined, patients)[name], values)


def test_site_without_images_has_no_metric() -> None:
    nothing = np.zeros((0, 2, 4, 4))
    assert set(segmentation_metrics(sums_of(nothing, nothing, []), LABELS).values()) == {None}


def test_refuses_what_cannot_be_judged() -> None:
    logits, masks, patients = data(2)
    with pytest.raises(ModelError, match="diverged"):
        score_cases(np.where(masks > 0, np.nan, logits), masks)
    with pytest.raises(DataError, match=r"0 or 1$"):
        score_cases(logits, np.where(masks > 0, np.nan, 0))
    with pytest.raises(DataError, match="expected the same"):
        score_cases(logits, masks[:, :1])
    with pytest.raises(DataError, match="1 patient ids for 2 images"):
        segmentation_sums(score_cases(logits, masks), patients[:1])
    with pytest.raises(DataError, match="1 label names for 2"):
        segmentation_metrics(sums_of(logits, masks, patients), ["x"])
