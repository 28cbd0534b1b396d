"""In which form a site's policy lets its classification scores leave: `exact`, `histogram` or `none`.

`exact` is for scores that leave nobody's house, the server's own and simulated hospitals'; `histogram` for hospitals;
`none` for a hospital that lets its evaluation out in no form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError
from fedmed.metrics.bootstrap import intervals_classification
from fedmed.metrics.classification import classification_metrics, classification_sums
from fedmed.metrics.site_variance import auroc_variances, parted_variances
from fedmed.metrics.sums import Array, Metrics, add_sums, check_cases, check_patients
from fedmed.types import Sums

Form = Literal["exact", "histogram", "none"]


def released(
    form: Form,
    logits: NDArray[np.floating],
    targets: NDArray[np.floating],
    patients: Sequence[str],
    *,
    in_house: bool,
    centres: Sequence[float] | None = None,
) -> dict[str, Array]:
    """Returns all of an evaluation that may leave.

    Args:
        form: What the site's policy allows.
        logits: (N, L), finite.
        targets: (N, L), 0, 1 or NaN where unknown.
        patients: N patient ids, which never leave.
        in_house: Whether the patients are the server's own or those of a simulation.
        centres: As for `classification_sums`.

    Returns:
        Nothing for `none`; `classification_sums` and `auroc_variances` for `histogram`; for `exact` `scores` and
        `targets` (N * L,), image after image, and `patient` (N,), a number from 0 up in place of each id. Numbers
        follow the order of images.

    Raises:
        ConfigError: If the form is unknown, or exact scores are asked for outside of the house.
        ModelError: If a logit is NaN or infinite.
        DataError: If shapes disagree or a target is none of 0, 1 and NaN.
    """
    if form not in get_args(Form):
        raise ConfigError(f"unknown form of metrics; expected one of {', '.join(get_args(Form))}")
    if form == "none":
        return {}
    if form == "histogram":
        sums = classification_sums(logits, targets, patients, centres)
        return {**sums, **auroc_variances(logits, targets, patients)}
    if not in_house:
        raise ConfigError('exact scores never leave a hospital; its policy can allow "histogram" or "none"')
    check_cases(logits, targets, unknown=True)
    check_patients(patients, len(logits))
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    return {
        "scores": logits.ravel().astype(np.float64),
        "targets": targets.ravel().astype(np.float64),
        "patient": np.array([numbers[patient] for patient in patients], dtype=np.float64),
    }


def metrics_of_released(
    sites: Iterable[Sums], labels: Sequence[str], centres: Sequence[float] | None = None
) -> Metrics:
    """Returns the metrics of what several sites released, each in its own form, as if their images were pooled.

    They are exact if nobody sent histograms; otherwise exact scores are counted into histograms too.

    Args:
        sites: What `released` returned at each; those that released nothing are left out.
        labels: L names, in the order of the logits.
        centres: What the sites were given, for the exact scores among histograms.

    Raises:
        UpdateRefused: If the sums of sites do not fit each other.
    """
    given = [site for site in sites if site]
    if given and all("scores" in site for site in given):
        scores = [_scores(site, labels) for site in given]
        logits, targets = (np.concatenate([pair[part] for pair in scores]) for part in (0, 1))
        patients = [f"{number}/{patient:g}" for number, site in enumerate(given) for patient in site["patient"]]
        intervals = intervals_classification(logits, targets, patients, labels, 0, np.random.default_rng(0))
        return {name: interval.value for name, interval in intervals.items()}
    nothing = np.zeros((0, len(labels)))
    sums = [
        classification_sums(*_scores(site, labels), [f"{patient:g}" for patient in site["patient"]], centres)
        if "scores" in site
        else parted_variances(site)[0]
        for site in given
    ]
    return classification_metrics(add_sums([classification_sums(nothing, nothing, []), *sums]), labels)


def _scores(site: Sums, labels: Sequence[str]) -> tuple[Array, Array]:
    """Returns the logits and targets (N, L) of a site that released them."""
    return site["scores"].reshape(-1, len(labels)), site["targets"].reshape(-1, len(labels))
