"""What may leave a site before it joins: enough to see whether hospitals fit each other, and nothing of a patient.

Made from a data check's facts. Counts are of patients, rounded down to tens, and null below ten, so that neither a
count nor the difference of two tells of fewer than ten people. Percentiles are the 10th, 50th and 90th of patients'
medians, never extremes, and only of twenty patients or more. A prevalence needs ten patients on either side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmed.errors import DataError
from fedmed.types import SMALL

PERCENTILES = (10, 50, 90)
SMALLEST_SAMPLE = 20  # patients: so that two at least lie beyond the 10th and the 90th percentile
ENOUGH = 100  # patients from whom a prevalence has two decimals

Text = Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f]*$")]  # it is printed at another institution
Count = Annotated[int, Field(ge=SMALL, multiple_of=SMALL)]
Spacing = tuple[float, float, float]


class LabelFacts(BaseModel):
    """Of one label."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    patients: Count | None  # of whom it is known
    prevalence: Annotated[float, Field(ge=0, le=1)] | None


class Card(BaseModel):
    """What leaves."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["fedmed data card"] = "fedmed data card"
    fedmed: Text
    check: Literal["pass", "warn", "fail"]
    task: Literal["classification", "segmentation"]
    patients: Count | None
    images_per_patient: Annotated[float, Field(ge=0)] | None  # rounded to one digit after the point
    labels: dict[Text, LabelFacts]
    modalities: dict[Text, Count]
    makers: dict[Text, Count]
    photometric: dict[Text, Count]
    spacing_mm: Spacing | None  # 10th, 50th and 90th percentile, in the plane
    gap_mm: Spacing | None  # the same, between slices


def card_of(facts: Mapping[str, Any]) -> Card:
    """The card of a checked data set.

    Args:
        facts: of `check.check`.
    """
    patients, of = _count(facts["patients"]), facts["patients_of"]
    return Card(
        fedmed=facts["fedmed"],
        check=facts["state"],
        task="segmentation" if facts["masks"] else "classification",
        patients=patients,
        images_per_patient=round(facts["images"] / facts["patients"], 1) if patients else None,
        labels={name: _label(each) for name, each in facts["labels"].items()},
        modalities=_counts(of.get("modality", {})),
        makers=_counts(of.get("maker", {})),
        photometric=_counts(of.get("photometric", {})),
        spacing_mm=_percentiles(facts["spacing_mm"]),
        gap_mm=_percentiles(facts["gap_mm"]),
    )


def read_facts(path: Path, manifest: str) -> dict[str, Any]:
    """The facts of the last check of a manifest.

    Args:
        path: of `check.json`.
        manifest: SHA-256 of the manifest as it is now, hexadecimal.

    Raises:
        DataError: there was no check, or the manifest has changed since.
    """
    command = f"fedmed data check {quote(str(path.parent))}"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = facts["manifest"] == manifest
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path.parent}: was not checked yet; {command}") from None
    if not same:
        raise DataError(f"{path.parent}: the manifest has changed since its check; {command}")
    return facts


def read_card(path: Path) -> Card:
    """A card from another institution.

    Raises:
        DataError: it is none.
    """
    try:
        return Card.model_validate_json(path.read_bytes()[: 2**20])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"])) or "it"
        raise DataError(f"{path}: no card of fedmed data card ({place}: {problem['msg']})") from None


def _count(count: int) -> int | None:
    """Rounded down to tens; None below ten."""
    return count // SMALL * SMALL or None


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    """What ten patients or more share; of the rest not even the name."""
    rounded = {name: _count(count) for name, count in counts.items()}
    return {name: count for name, count in sorted(rounded.items()) if count is not None}


def _label(counts: Mapping[str, int]) -> LabelFacts:
    positive, negative = counts["positive_patients"], counts["negative_patients"]
    known = positive + negative
    if min(positive, negative) < SMALL:
        return LabelFacts(patients=_count(known), prevalence=None)
    return LabelFacts(patients=_count(known), prevalence=round(positive / known, 2 if known >= ENOUGH else 1))


def _percentiles(values: Sequence[float]) -> Spacing | None:
    """Of patients' medians, with two significant digits."""
    if len(values) < SMALLEST_SAMPLE:
        return None
    low, middle, high = (float(f"{value:.2g}") for value in np.percentile(values, PERCENTILES))
    return low, middle, high
