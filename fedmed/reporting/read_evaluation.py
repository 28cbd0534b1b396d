"""Reads `evaluation.json` of a run and `findings.json` of a site; unknown keys are ignored, missing ones are empty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedmed.reporting.facts import Counts, Curve, Estimate, Evaluation, Findings, Gain, Metrics, Picture, Threshold
from fedmed.reporting.values import count_of, mapping_of, number_of, numbers_of, places_of, sequence_of, text_of

IMAGES = ("data:image/webp;base64,", "data:image/png;base64,")  # a page asks the network for nothing else either
CELLS = ("true_positives", "false_negatives", "false_positives", "true_negatives")


def read_evaluation(file: Path, notes: list[str]) -> Evaluation | None:
    """The server's evaluation; None where there is none, with a note where it cannot be read."""
    try:
        raw = mapping_of(json.loads(file.read_text(encoding="utf-8")))
        kind = text_of(raw.get("kind"))
        if kind not in ("classification", "segmentation"):
            raise ValueError("unknown kind")
        return Evaluation(
            kind=kind,
            patients=count_of(raw.get("patients")),
            images=count_of(raw.get("images")),
            counts=_counts(raw.get("counts")),
            curves=_curves(raw.get("curves"), "false_positive_rate", "true_positive_rate"),
            precision_recall=_curves(raw.get("precision_recall"), "recall", "precision"),
            calibration=_curves(raw.get("calibration"), "probability", "observed"),
            thresholds={label: _threshold(item) for label, item in mapping_of(raw.get("thresholds")).items()},
            cases={label: numbers_of(item) for label, item in mapping_of(raw.get("cases")).items()},
            hd95={label: numbers_of(item) for label, item in mapping_of(raw.get("hd95")).items()},
            pictures=_pictures(raw.get("pictures")),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        notes.append("evaluation.json cannot be read: curves and distributions are left out.")
        return None


def read_findings(file: Path) -> Findings | None:
    """A site's own findings; None where there are none or they cannot be read."""
    raw = _object(file)
    return findings_of(raw) if raw else None


def read_gains(file: Path) -> tuple[Findings, tuple[Gain, ...]] | None:
    """A site's own part of a comparison: whose it is, and how every network does at its patients."""
    raw = _object(file)
    if not raw:
        return None
    arms = [mapping_of(item) for item in sequence_of(raw.get("arms"))]
    gains = tuple(
        Gain(
            network=text_of(arm.get("arm")),
            reached=estimate_of(arm),
            gain=estimate_of(gained) if (gained := mapping_of(arm.get("gain_over_local"))) else None,
        )
        for arm in arms
    )
    return findings_of({"site": raw.get("site"), "run": raw.get("name"), "primary": raw.get("primary")}), gains


def findings_of(raw: Mapping[str, object]) -> Findings:
    """The content of `findings.json`; whatever is missing is empty."""
    held, unreadable = mapping_of(raw.get("held_out")), mapping_of(raw.get("unreadable"))
    return Findings(
        site=text_of(raw.get("site")),
        run=text_of(raw.get("run")),
        model=text_of(raw.get("model")),
        task=text_of(raw.get("task")),
        primary=text_of(raw.get("primary")),
        round=count_of(raw.get("round")),
        patients=count_of(raw.get("patients")),
        images=count_of(raw.get("images")),
        held_out_patients=count_of(held.get("patients")),
        held_out_items=count_of(held.get("items")),
        unreadable=count_of(unreadable.get("images")),
        reasons={reason: count_of(count) for reason, count in mapping_of(unreadable.get("reasons")).items()},
        scanners=tuple(
            (text_of(item.get("scanner")), count_of(item.get("images")))
            for item in map(mapping_of, sequence_of(raw.get("scanners")))
        ),
        prevalence=_counts(raw.get("prevalence")),
        metrics=metrics_of(raw.get("metrics")),
        pictures=_pictures(raw.get("pictures")),
    )


def _object(file: Path) -> Mapping[str, object]:
    try:
        return mapping_of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def metrics_of(raw: object) -> Metrics:
    """Metrics by name, as `result.json` holds them."""
    return {name: estimate_of(mapping_of(item)) for name, item in mapping_of(raw).items()}


def estimate_of(raw: Mapping[str, object]) -> Estimate:
    """One metric."""
    return Estimate(
        value=number_of(raw.get("value")),
        low=number_of(raw.get("low")),
        high=number_of(raw.get("high")),
        patients=count_of(raw.get("n")),
        bound=number_of(raw.get("bound")),
        noise=number_of(raw.get("noise")),
    )


def _counts(raw: object) -> dict[str, Counts]:
    return {
        label: Counts(positives=count_of(item.get("positives")), negatives=count_of(item.get("negatives")))
        for label, item in ((label, mapping_of(value)) for label, value in mapping_of(raw).items())
    }


def _curves(raw: object, x: str, y: str) -> dict[str, Curve | None]:
    return {label: _curve(mapping_of(item), x, y) for label, item in mapping_of(raw).items()}


def _curve(raw: Mapping[str, object], x: str, y: str) -> Curve | None:
    across, up = numbers_of(raw.get(x)), numbers_of(raw.get(y))
    if len(across) != len(up) or not across:
        return None
    at: list[float | None] = places_of(raw.get("at")) or [*across]
    low, high = places_of(raw.get("low")), places_of(raw.get("high"))
    if not len(at) == len(low) == len(high):
        at, low, high = [], [], []
    images = [int(count) for count in numbers_of(raw.get("images"))]
    return Curve(x=across, y=up, at=at, low=low, high=high, images=images if len(images) == len(across) else [])


def _threshold(raw: object) -> Threshold:
    values = mapping_of(raw)
    hit, missed, false_alarm, passed = (count_of(values.get(cell)) for cell in CELLS)
    return Threshold(
        probability=number_of(values.get("probability")),
        chosen=values.get("chosen") is True,
        cells=(hit, missed, false_alarm, passed),
        rates=metrics_of(values.get("rates")),
    )


def _pictures(raw: object) -> tuple[Picture, ...]:
    items = [mapping_of(item) for item in sequence_of(raw)]
    return tuple(
        Picture(
            kind="best" if item.get("kind") == "best" else "worst",
            score=number_of(item.get("score")),
            outcome=text_of(item.get("outcome")),
            image=text_of(item.get("image")),
        )
        for item in items
        if text_of(item.get("image")).startswith(IMAGES)
    )
