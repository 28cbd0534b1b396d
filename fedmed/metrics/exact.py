"""The scores of single images, for a site that lets them leave: exact metrics, and intervals by patient.

No id leaves, nor the order of the manifest: images stand in random order, and patients are numbered as they come up
there. Which images are of one patient is told, as the interval needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UpdateRefused
from fedmed.metrics.bootstrap import classification_intervals
from fedmed.metrics.resampling import Interval
from fedmed.metrics.sums import Array, check_cases, check_patients
from fedmed.types import Sums

SCORES, TARGETS, PATIENT, PATIENTS = "scores", "targets", "patient", "patients"
UNKNOWN = -1.0  # in place of NaN, which no sum may hold
LARGEST = 1e30  # of a logit
MOST = 2_000_000  # scores of a site, which the server resamples: 1,000 times in about a minute


def exact_scores(
    logits: NDArray[np.floating], targets: NDArray[np.floating], patients: Sequence[str]
) -> dict[str, Array]:
    """Returns the scores of the n ≤ N images of which any target is known; without such images, nothing.

    Args:
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids, which never leave.

    Returns:
        `scores` (n * L,), logits, image after image, 0 where the target is unknown; `targets` (n * L,), 0, 1 or -1
        where unknown; `patient` (n,), a number from 0 up in place of each id; `patients` (1,), distinct ones.

    Raises:
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    rows = np.random.default_rng().permutation(np.flatnonzero(~np.isnan(targets).all(axis=1)))
    known = ~np.isnan(targets[rows])
    names = [patients[row] for row in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if not numbers:
        return {}
    return {
        SCORES: np.where(known, logits[rows], 0.0).ravel().astype(np.float64),
        TARGETS: np.where(known, targets[rows], UNKNOWN).ravel().astype(np.float64),
        PATIENT: np.array([numbers[name] for name in names], dtype=np.float64),
        PATIENTS: np.array([len(numbers)], dtype=np.float64),
    }


def is_exact(sums: Sums) -> bool:
    """Whether a site sent these instead of sums."""
    return SCORES in sums


def check_exact(sums: Sums, labels: int) -> None:
    """Refuses what no site can have sent as the scores of its images.

    Raises:
        UpdateRefused: If names or sizes are others, a score is no number, a target none of 0, 1 and -1, or patients are
            not numbered from 0 up.
    """
    if sums.keys() != {SCORES, TARGETS, PATIENT, PATIENTS}:
        raise UpdateRefused(f"scores of images come as {sorted(sums)}; expected scores, targets, patient, patients")
    scores, targets, patient, patients = (sums[name].ravel() for name in (SCORES, TARGETS, PATIENT, PATIENTS))
    if len(scores) > MOST:
        raise UpdateRefused(
            f'{len(scores)} scores of images, above {MOST}; with metrics = "histogram" there is no limit'
        )
    if not len(patient) * labels == len(scores) == len(targets) or len(patient) == 0 or len(patients) != 1:
        raise UpdateRefused(
            f"{len(scores)} scores and {len(targets)} targets of {len(patient)} images, {labels} labels"
        )
    if not (np.abs(scores) < LARGEST).all():
        raise UpdateRefused("a score of an image is not finite, or impossibly large")
    if not np.isin(targets, (0, 1, UNKNOWN)).all():
        raise UpdateRefused("a target of an image is none of 0, 1 and -1")
    numbers = np.unique(patient)
    if not np.array_equal(numbers, np.arange(len(numbers))) or patients[0] != len(numbers):
        raise UpdateRefused("patients are not numbered from 0 up")


def exact_metrics(sums: Sums, labels: Sequence[str], replicates: int = 0) -> dict[str, Interval]:
    """Returns every metric of `classification_metrics`, without the error of histograms.

    Patients are resampled in an order that follows from their scores, so that the same scores give the same intervals.

    Args:
        sums: What one site sent, checked.
        labels: L names.
        replicates: Of the bootstrap by patient behind each interval; 0 = no intervals.
    """
    images = np.hstack([sums[name].reshape(-1, len(labels)) for name in (SCORES, TARGETS)])
    different, place = np.unique(images, axis=0, return_inverse=True)
    of_patient: dict[float, list[int]] = {}
    for number, where in zip(sums[PATIENT].tolist(), place.ravel().tolist(), strict=True):
        of_patient.setdefault(number, []).append(where)
    cases = sorted(sorted(places) for places in of_patient.values())
    logits, told = np.hsplit(different[[where for places in cases for where in places]], 2)
    patients = [str(number) for number, places in enumerate(cases) for _ in places]
    targets = np.where(told == UNKNOWN, np.nan, told)
    return classification_intervals(logits, targets, patients, labels, replicates, np.random.default_rng(0))
