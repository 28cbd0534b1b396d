"""What a data check has seen so far, and the facts that it comes to.

What is kept of an image are counts, a thumbnail of 576 bytes and a digest of 8, so that memory grows by about a
kilobyte an image, whatever its size.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import fedmed
from fedmed.durable import sha256_of
from fedmed.intake.survey import SIDE

SCHEMA = 1
BINS = 20
Arrays = dict[str, NDArray[Any]]


@dataclass(kw_only=True)
class Seen:
    """What was seen of a manifest so far, by row or by image."""

    rows: list[int]  # number of each row in the file
    patients: NDArray[np.int64]  # (rows,) a number for each patient
    splits: NDArray[np.int64]  # (rows,) a number for each split
    labels: dict[str, NDArray[np.int8]]  # (rows,) 0, 1, or -1 = unknown
    masked: bool
    images: int = 0
    thumbnails: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, SIDE, SIDE), np.uint8), repr=False)
    of_row: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)  # (images,)
    prints: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)  # 0 = none
    unreadable: dict[int, str] = field(default_factory=dict)  # row -> reason
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # what -> value -> images
    patients_of: dict[str, dict[str, set[int]]] = field(default_factory=dict)  # what -> value -> patients
    marks: dict[str, list[int]] = field(default_factory=dict)  # what is odd -> rows
    spacing_mm: list[tuple[int, float]] = field(default_factory=list)  # patient, in the plane
    gap_mm: list[tuple[int, float]] = field(default_factory=list)  # patient, between slices
    ages: list[float] = field(default_factory=list)  # years, by row
    headers: int = 0  # images with a DICOM header
    searched: int = 0  # images in which text was looked for
    sizes: list[float] = field(default_factory=list)  # longest side, pixels
    pictures: list[str] = field(default_factory=list)  # data URIs


def add_(seen: Seen, number: int, row: int, arrays: Arrays) -> None:
    """Add one image that was looked at, image `number` of them all, in row `row`."""
    facts, patient = json.loads(arrays["facts"].tobytes()), int(seen.patients[row])
    seen.thumbnails[number] = arrays["thumbnail"]
    if len(arrays["digest"]):
        seen.prints[number] = int.from_bytes(arrays["digest"].tobytes())
    for what in ("format", "modality", "photometric", "syntax", "maker"):
        if facts.get(what):
            seen.counts.setdefault(what, Counter())[facts[what]] += 1
            seen.patients_of.setdefault(what, {}).setdefault(facts[what], set()).add(patient)
    if facts.get("maker") or facts.get("model"):
        seen.counts.setdefault("scanner", Counter())[f"{facts['maker']} {facts['model']}".strip()] += 1
    spacing = facts.get("spacing_mm") or []
    if spacing:
        seen.spacing_mm.append((patient, float(spacing[-1])))
    if len(spacing) == 3:
        seen.gap_mm.append((patient, float(spacing[0])))
    seen.headers += "marked" in facts
    seen.searched += facts.get("searched", False)
    seen.sizes.append(float(max(facts["size"][-2:])))
    for mark, odd in (
        ("identified", facts.get("named") and not facts["marked"]),
        ("marked, and named", facts.get("named") and facts["marked"]),
        ("unmarked", not facts.get("marked", True) and not facts.get("named")),
        (f"quarantine: {facts.get('quarantine')}", facts.get("quarantine")),
        ("secondary capture", facts.get("capture")),
        ("faint", facts.get("faint")),
        ("several frames", facts.get("frames", 1) > 1),
        (f"mask: {facts.get('mask')}", facts.get("mask")),
    ):
        if odd:
            seen.marks.setdefault(mark, []).append(row)
    if arrays["picture"].size:
        buffer = io.BytesIO()
        Image.fromarray(arrays["picture"]).save(buffer, "JPEG", quality=75)
        seen.pictures.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def facts_of(seen: Seen, manifest: Path) -> dict[str, Any]:
    """What was seen of a manifest, as JSON can hold it: exact counts, for the site alone."""
    images_of_patient = np.bincount(seen.patients).astype(float).tolist()
    return {
        "schema": SCHEMA,
        "fedmed": fedmed.__version__,
        "manifest": sha256_of(manifest),
        "patients": len(images_of_patient),
        "rows": len(seen.rows),
        "images": seen.images,
        "masks": seen.masked,
        "unreadable": dict(Counter(seen.unreadable.values()).most_common()),
        "labels": {name: _label(values, seen.patients) for name, values in seen.labels.items()},
        "counts": {what: dict(values.most_common(50)) for what, values in seen.counts.items() if values},
        "patients_of": {
            what: {value: len(patients) for value, patients in values.items()}
            for what, values in seen.patients_of.items()
        },
        "spacing_mm": _by_patient(seen.spacing_mm),
        "gap_mm": _by_patient(seen.gap_mm),
        "histograms": {
            name: _histogram(values)
            for name, values in (
                ("spacing in the plane, mm", [value for _, value in seen.spacing_mm]),
                ("distance of slices, mm", [value for _, value in seen.gap_mm]),
                ("longest side, pixels", seen.sizes),
                ("age, years", seen.ages),
                ("images of a patient", images_of_patient),
            )
            if values
        },
        "pictures": seen.pictures,
    }


def _label(values: NDArray[np.int8], patients: NDArray[np.int64]) -> dict[str, int]:
    """A label by image, and by patient: who is positive in one image is a positive patient."""
    positive = set(patients[values == 1].tolist())
    known = set(patients[values >= 0].tolist())
    return {
        "positive": int((values == 1).sum()),
        "negative": int((values == 0).sum()),
        "unknown": int((values < 0).sum()),
        "positive_patients": len(positive),
        "negative_patients": len(known - positive),
    }


def _by_patient(values: list[tuple[int, float]]) -> list[float]:
    """Each patient's median, in order: who has many images does not count more."""
    of_patient: dict[int, list[float]] = {}
    for patient, value in values:
        of_patient.setdefault(patient, []).append(value)
    return sorted(round(float(np.median(each)), 4) for each in of_patient.values())


def _histogram(values: Sequence[float]) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=min(BINS, max(1, len(set(values)))))
    return {
        "counts": counts.tolist(),
        "edges": [round(float(edge), 4) for edge in edges],
        "range": [float(min(values)), float(max(values))],
    }
