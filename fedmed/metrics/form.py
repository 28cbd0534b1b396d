"""In which form a site's policy lets its classification scores leave: `histogram` or `none`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError
from fedmed.metrics.classification import classification_sums
from fedmed.metrics.site_variance import auroc_variances
from fedmed.metrics.sums import Array

Form = Literal["histogram", "none"]


def released(
    form: Form,
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    *,
    centres: Sequence[float] | None = None,
) -> dict[str, Array]:
    """Returns all of an evaluation that may leave.

    Args:
        form: What the site's policy allows.
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids, which never leave.
        centres: As for `classification_sums`.

    Returns:
        Nothing for `none`; `classification_sums` and `auroc_variances` for `histogram`.

    Raises:
        ConfigError: If the form is unknown.
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    if form not in get_args(Form):
        raise ConfigError(f"unknown form of metrics; expected one of {', '.join(get_args(Form))}")
    if form == "none":
        return {}
    sums = classification_sums(logits, targets, patients, centres)
    return {**sums, **auroc_variances(logits, targets, patients)}
