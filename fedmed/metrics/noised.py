"""Sums to which a patient adds little, so that noise can hide the patient, and the metrics of such sums under noise.

A patient adds one vector, the mean over all images of that patient, whatever their number; `longest` is the most that
its L2 norm can be with L labels, known before any patient is looked at:

* classification: for each label, which of 16 bins the logit falls into, apart for positives and negatives. The shares
  of a label add up to 1 at most, so the norm is at most √L. Every image of a patient weighs the same, and so does every
  patient: the AUROC is that of one random image each of a random positive and a random negative patient.
* segmentation: for each label the Dice coefficient of the case, less ½. It is within ±½, so the norm is at most √L / 2.
  The number of patients is public, so their halves are added again without noise.

Few sums, because each bears noise of the same size s: that of an AUROC grows with the square root of the number of
bins. 16 of them, around the middle of the server's logits, make it up to .015 too small for normal scores.

With ε = 1 at δ = 1e-6 (s = 4.3 for one label), 30 % positives and an AUROC of .86, the standard deviation of the noise
of an AUROC is .024 with 1,000 held-out patients and .0024 with 10,000; 100 patients need ε = 4 (.07), and with ε = 1
their AUROC is undefined mostly. That of a mean Dice is .021 with 100, .0021 with 1,000 and .0002 with 10,000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UpdateRefused
from fedmed.metrics.cases import Cases
from fedmed.metrics.histograms import bin_edges, check_centres
from fedmed.metrics.sums import Array, check_cases, check_patients
from fedmed.types import Sums

SUMS, NOISE, PATIENTS = "noised", "noise", "patients"
COARSE = 16  # bins of a logit
CERTAIN = 1.96  # standard deviations of a 95 % interval
LARGEST, LEAST_NOISE = 1e30, 1e-9  # of a sum and of its noise: what is computed of both is finite
CLEAR = 4.0  # standard deviations of noise that a class must stand out by, or its AUROC would be chance
Kind = Literal["classification", "segmentation"]


class Noised(NamedTuple):
    """A metric under noise."""

    value: float | None
    noise: float | None  # 95 % of the time the metric without noise is no farther away; says nothing of the sample


def longest(kind: Kind, labels: int) -> float:
    """Returns the most that one patient's vector can be long, L2."""
    return math.sqrt(labels) if kind == "classification" else math.sqrt(labels) / 2


def patient_histograms(
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    centres: Sequence[float] | None = None,
) -> Array:
    """Returns (patients, 2 * L * 16): positives before negatives, in each label after label, from the lowest bin up.

    Args:
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids.
        centres: L logits around which the bins are finest; 0 for every label if None.

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree, a target is none of 0, 1 and NaN, or the centres are none.
    """
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    labels = logits.shape[1]
    check_centres(centres, labels)
    who, place = np.unique(np.array(patients), return_inverse=True)  # (P,), (N,)
    vectors = np.zeros((len(who), 2, labels, COARSE))
    for label, (column, target) in enumerate(zip(logits.T, targets.T, strict=True)):
        inner = bin_edges(centres[label] if centres is not None else 0.0, COARSE)[1:-1]
        known = ~np.isnan(target)
        images = np.bincount(place[known], minlength=len(who))  # (P,)
        owner, negative = place[known], (target[known] == 0).astype(np.int64)
        np.add.at(vectors, (owner, negative, label, np.searchsorted(inner, column[known])), 1 / images[owner])
    return vectors.reshape(len(who), 2 * labels * COARSE)


def patient_overlaps(cases: Cases, patients: Sequence[str]) -> Array:
    """Returns (patients, L): of each patient the mean Dice coefficient over cases, less ½."""
    check_patients(patients, len(cases.loss))
    who, place = np.unique(np.array(patients), return_inverse=True)
    vectors = np.zeros((len(who), cases.dice.shape[1]))
    np.add.at(vectors, place, cases.dice - 0.5)
    return vectors / np.bincount(place, minlength=len(who))[:, None]


def is_noised(sums: Sums) -> bool:
    """Whether sums are of this kind."""
    return NOISE in sums


def check_noised(sums: Sums, kind: Kind, labels: int) -> None:
    """Refuses noised sums that no site of this kind of task can have sent.

    Raises:
        UpdateRefused: A name or shape is another one, a number is not finite or too large, or there is hardly any noise
            or no whole number of patients.
    """
    shapes = {SUMS: (2 * labels * COARSE if kind == "classification" else labels,), NOISE: (1,), PATIENTS: (1,)}
    if {name: values.shape for name, values in sums.items()} != shapes:
        raise UpdateRefused(f"noised sums hold {sorted(sums)}; expected {shapes}")
    possible = all((np.abs(values) < LARGEST).all() for values in sums.values())
    if not possible or sums[NOISE][0] < LEAST_NOISE or sums[PATIENTS][0] < 1 or sums[PATIENTS][0] % 1:
        raise UpdateRefused("noised sums hold a number that cannot be, or come without noise or patients")


def noised_metrics(sums: Sums, kind: Kind, labels: Sequence[str]) -> Mapping[str, Noised]:
    """Returns `auroc` or `dice`, and either by label; as everywhere the mean is over the defined labels.

    Args:
        sums: From one site: `noised`, the sum over patients; `noise`, the standard deviation on each value; `patients`.
        kind: Of the task.
        labels: L names.
    """
    name, found = ("auroc", _aurocs(sums)) if kind == "classification" else ("dice", _overlaps(sums))
    defined = [(value, deviation) for value, deviation in found if not math.isnan(value)]
    values, deviations = zip(*defined, strict=True) if defined else ((math.nan,), (math.nan,))
    mean = (float(np.mean(values)), math.hypot(*deviations) / len(deviations))  # labels have noise of their own each
    named = zip((name, *(f"{name}/{label}" for label in labels)), (mean, *found), strict=True)
    return {
        key: Noised(None, None) if math.isnan(value) else Noised(min(max(value, 0.0), 1.0), CERTAIN * deviation)
        for key, (value, deviation) in named
    }


def _overlaps(sums: Sums) -> list[tuple[float, float]]:
    """Returns each label's mean Dice and its noise."""
    patients, noise = float(sums[PATIENTS][0]), float(sums[NOISE][0])
    return [(0.5 + float(total) / patients, noise / patients) for total in sums[SUMS]]


def _aurocs(sums: Sums) -> list[tuple[float, float]]:
    """Returns each label's AUROC and its noise; NaN where a class does not stand out of the noise.

    With p and n the noised histograms, P and N their totals, F the share of negatives below a bin and half of those in
    it, and G that of positives above: A = Σ p F / P, and to first order

        var A = s² (Σ (F - A)² / P² + Σ (G - A)² / N²).

    Bins keep the sign that noise gave them: cutting them off at 0 would pull every AUROC towards ½.
    """
    noise = float(sums[NOISE][0])
    positives, negatives = sums[SUMS].reshape(2, -1, COARSE)  # (L, 16) each
    found = []
    for here, others in zip(positives, negatives, strict=True):
        totals = here.sum(), others.sum()
        if min(totals) <= CLEAR * noise * math.sqrt(COARSE):
            found.append((math.nan, math.nan))
            continue
        below = (np.cumsum(others) - others / 2) / totals[1]
        above = 1 - (np.cumsum(here) - here / 2) / totals[0]
        area = float((here * below).sum() / totals[0])
        variance = ((below - area) ** 2).sum() / totals[0] ** 2 + ((above - area) ** 2).sum() / totals[1] ** 2
        found.append((area, noise * math.sqrt(variance)))
    return found
