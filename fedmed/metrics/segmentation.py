"""Segmentation with several labels: the sums that a site sends, and the metrics that the server computes from them.

The headline is the mean over cases, in which a small organ counts as much as a large one. The same ratio of summed
numerators and denominators, in which every voxel counts alike, is called micro.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.metrics.cases import Cases, overlap
from fedmed.metrics.sums import Array, Metrics, by_label, check_labels, check_patients, quotient, ratio
from fedmed.types import Sums


def segmentation_sums(cases: Cases, patients: Sequence[str], *, fewest: int = 0) -> dict[str, Array]:
    """Returns what a site contributes to the metrics; sums over sites equal the sums of the pooled cases.

    Args:
        cases: Scores of all cases.
        patients: One for each case.
        fewest: Patients with a label, but for nobody, below which the sums of that label are those of no case; and
            patients whose surfaces have a distance, below which distances are. They would tell of single patients.

    Returns:
        `loss` (1,), each case's mean over voxels and labels, summed over cases; `known` (1,) and `images` (1,), the
        number of cases; `patients` (1,), distinct ones; and for each label (L,): `cases`; `dice`, `dice-square` and
        `iou`, the sums of each case's coefficient, of its square, and of its IoU; `intersection` and `total`, in
        voxels; `hd95` and `assd`, sums in mm over the `measured` cases; `excluded`, cases of which exactly one mask is
        empty; `lesions`, `lesions-found` and `lesions-invented`.

    Raises:
        DataError: If there is not one patient for each case.
    """
    check_patients(patients, len(cases.loss))
    count = np.array([len(cases.loss)], dtype=np.float64)
    told = _enough(cases.true > 0, patients, fewest)  # (L,) 0 or 1
    near = told * _enough(cases.measured, patients, fewest)
    return {
        "loss": np.array([cases.loss.sum()]),
        "known": count,
        "cases": told * count[0],
        "dice": told * cases.dice.sum(axis=0),
        "dice-square": told * np.square(cases.dice).sum(axis=0),
        "iou": told * cases.iou.sum(axis=0),
        "intersection": told * cases.intersection.sum(axis=0),
        "total": told * cases.total.sum(axis=0),
        "hd95": near * np.nansum(cases.hd95, axis=0),
        "assd": near * np.nansum(cases.assd, axis=0),
        "measured": near * cases.measured.sum(axis=0),
        "excluded": told * cases.excluded.sum(axis=0),
        "lesions": told * cases.lesions.sum(axis=0),
        "lesions-found": told * cases.lesions_found.sum(axis=0),
        "lesions-invented": told * cases.lesions_invented.sum(axis=0),
        "patients": np.array([len(set(patients))], dtype=np.float64),
        "images": count.copy(),
    }


def _enough(cases: NDArray[np.bool_], patients: Sequence[str], fewest: int) -> Array:
    """Returns 1 for each label of whose cases (N, L) nobody or at least so many patients have one, else 0."""
    ids = np.array(patients, dtype=np.str_)
    people = np.array([len(np.unique(ids[cases[:, k]])) for k in range(cases.shape[1])])
    return np.where((people == 0) | (people >= fewest), 1.0, 0.0)


def segmentation_metrics(sums: Sums, labels: Sequence[str]) -> Metrics:
    """Returns the metrics of pooled sums.

    Args:
        sums: From `segmentation_sums`, added over sites.
        labels: L names, in the order of the logits.

    Returns:
        `loss`, and by label, as `<metric>/<label>`:

        * `dice` and `iou`, means over cases;
        * `micro-dice` and `micro-iou`, the coefficients of all cases' voxels pooled;
        * `hd95` and `assd`, means in mm over the cases of which neither mask is empty, and `hd95-excluded`, the number
          of cases of which exactly one is;
        * `lesion-sensitivity`, the share of all true lesions that were found;
        * `lesion-false-positives`, the mean number per case of predicted lesions where none is.

        `<metric>` is the mean over the labels for which it is defined; only of `micro-dice` and `micro-iou` the
        coefficient of all labels' voxels pooled too, and of `hd95-excluded` the sum. None where undefined: there is no
        case, or none that counts.

    Raises:
        DataError: If the sums are those of another number of labels.
    """
    check_labels(labels, len(sums["cases"]))
    cases, union = sums["cases"], sums["total"] - sums["intersection"]
    micro_dice, micro_iou = overlap(2 * sums["intersection"], sums["total"]), overlap(sums["intersection"], union)
    pooled_dice = overlap(2 * sums["intersection"].sum(), sums["total"].sum())
    pooled_iou = overlap(sums["intersection"].sum(), union.sum())
    judged = np.where(cases > 0, 1.0, np.nan)  # (L,)
    pooled = bool((cases > 0).any())
    return {
        "loss": ratio(sums["loss"][0], sums["known"][0]),
        **by_label("dice", quotient(sums["dice"], cases), labels),
        **by_label("iou", quotient(sums["iou"], cases), labels),
        **by_label("micro-dice", micro_dice * judged, labels),
        "micro-dice": float(pooled_dice) if pooled else None,
        **by_label("micro-iou", micro_iou * judged, labels),
        "micro-iou": float(pooled_iou) if pooled else None,
        **by_label("hd95", quotient(sums["hd95"], sums["measured"]), labels),
        **by_label("assd", quotient(sums["assd"], sums["measured"]), labels),
        **by_label("hd95-excluded", sums["excluded"] * judged, labels, add=True),
        **by_label("lesion-sensitivity", quotient(sums["lesions-found"], sums["lesions"]), labels),
        **by_label("lesion-false-positives", quotient(sums["lesions-invented"], cases), labels),
    }
