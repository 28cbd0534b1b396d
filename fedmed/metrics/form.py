"""In which form a site's policy lets its classification scores leave: `exact`, `histogram` or `none`.

Sums of a segmentation are exact in every form, so that only `none` differs there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError
from fedmed.metrics.classification import classification_sums
from fedmed.metrics.exact import exact_scores
from fedmed.metrics.site_variance import auroc_variances
from fedmed.metrics.sums import Array, check_cases, check_patients

Form = Literal["exact", "histogram", "none"]  # from the one that tells most


def sums_to_send(
    form: Form,
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    *,
    centres: Sequence[float] | None = None,
    fewest: int = 0,
) -> dict[str, Array]:
    """Returns all of an evaluation that may leave.

    Args:
        form: What the site's policy allows.
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids, which never leave.
        centres: As for `classification_sums`.
        fewest: Patients with a label, and without it, below which that label counts as unknown for everybody.

    Returns:
        Nothing for `none`; `classification_sums` and `auroc_variances` for `histogram`; `exact_scores` for `exact`.

    Raises:
        ConfigError: If the form is unknown.
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    if form not in get_args(Form):
        raise ConfigError(f"unknown form of metrics; expected one of {', '.join(get_args(Form))}")
    if form == "none":
        return {}
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    told = _withheld(targets, patients, fewest)
    if form == "exact":
        return exact_scores(logits, told, patients)
    return {**classification_sums(logits, told, patients, centres), **auroc_variances(logits, told, patients)}


def _withheld(targets: NDArray[np.floating], patients: Sequence[str], fewest: int) -> NDArray[np.floating]:
    """(N, L) the targets, NaN for a label that few patients have or few have not; of nobody known there is no count."""
    ids, told = np.asarray(patients), np.array(targets, copy=True)
    for k in range(told.shape[1]):
        if any(len(np.unique(ids[told[:, k] == value])) < fewest for value in (0, 1)):
            told[:, k] = np.nan
    return told
