"""`fedmed data check`: everything about a manifest that a training would trip over, before it does.

Every image is looked at once (`survey`), in processes whose end is one image's error. What is kept of it are counts, a
thumbnail of 576 bytes and a fingerprint of 8, so that memory grows by about a kilobyte an image, whatever its size.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import fedmed
from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.decoding import VOLUME_BYTES, VOLUME_TIMEOUT_S
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.manifest import images_of, read_records
from fedmed.intake.findings import Finding, findings, verdict
from fedmed.intake.near_duplicates import Alike, near_duplicates
from fedmed.intake.survey import SIDE

SCHEMA = 1
ABOUT = ("patient_id", "image", "mask", "study_uid", "series_uid", "view", "split", "site", "age", "sex")
PICTURES, PICTURE_SIDE = 24, 112  # thumbnails of a page, pixels
AHEAD = 4  # images that each process has waiting
BINS = 20

Told = Callable[[str, int, int], None]  # what is done, how far, of how much


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
    sizes: list[float] = field(default_factory=list)  # longest side, pixels
    pictures: list[str] = field(default_factory=list)  # data URIs


def check(
    manifest: Path, *, labels: Sequence[str] = (), processes: int = 2, progress: Told | None = None
) -> dict[str, Any]:
    """Look at everything that a manifest names.

    Args:
        manifest: the site's CSV.
        labels: of the task; () = every column that holds only 0, 1 and nothing.
        processes: that decode.
        progress: told what is done and how far.

    Returns:
        Facts that JSON can hold: `state` ("pass", "warn" or "fail"), `findings`, counts, histograms and pictures. They
        are for the site: exact, and with thumbnails. `card.card_of` takes from them what may leave.

    Raises:
        DataError: the manifest cannot be read at all.
    """
    header, records = read_records(manifest)
    for column in ("patient_id", "image"):
        if column not in header:
            raise DataError(f'{manifest}: no column "{column}"')
    if not records:
        raise DataError(f"{manifest}: the manifest has no rows")
    chosen = tuple(labels) or tuple(name for name in header if name not in ABOUT and _is_label(records, name))
    seen = Seen(
        rows=list(range(2, len(records) + 2)),
        patients=_numbers(record["patient_id"] for record in records),
        splits=_numbers(record.get("split", "") for record in records),
        labels={name: _values(records, name) for name in chosen if name in header},
        masked=any(record.get("mask") for record in records),
    )
    for name in ("view", "sex"):
        seen.counts[name] = Counter(record[name] or "not said" for record in records) if name in header else Counter()
    ages = [float(record["age"]) for record in records if record.get("age", "").replace(".", "", 1).isdigit()]
    _look_(seen, manifest, records, processes, progress)
    del records
    alike = near_duplicates(
        seen.thumbnails, seen.patients[seen.of_row], seen.splits[seen.of_row],
        progress=None if progress is None else lambda done, of: progress("comparing", done, of),
    )  # fmt: skip
    found = findings(seen, alike, manifest, tuple(labels) or tuple(seen.labels))
    return _facts(seen, manifest, found, alike, ages)


def _look_(
    seen: Seen, manifest: Path, records: Sequence[dict[str, str]], processes: int, progress: Told | None
) -> None:
    """Look at every image, and add what is seen."""
    jobs = [
        (row, str(image), str(manifest.parent / record["mask"]) if place == 0 and record.get("mask") else "")
        for row, record in enumerate(records)
        for place, image in enumerate(image for image in images_of(record["image"], manifest.parent) if image)
    ]
    shown = set(np.linspace(0, len(jobs) - 1, min(PICTURES, len(jobs))).astype(int).tolist())
    seen.images = len(jobs)
    seen.thumbnails = np.zeros((len(jobs), SIDE, SIDE), np.uint8)
    seen.of_row = np.array([row for row, _, _ in jobs], np.int64)
    seen.prints = np.zeros(len(jobs), np.uint64)
    with ExitStack() as stack:
        idle: SimpleQueue[DecodingProcess] = SimpleQueue()
        for _ in range(max(1, min(processes, len(jobs)))):
            process = DecodingProcess(
                timeout_s=VOLUME_TIMEOUT_S, memory_bytes=VOLUME_BYTES, jobs="fedmed.intake.survey"
            )
            idle.put(stack.enter_context(process))

        def one(number: int) -> dict[str, NDArray[Any]] | UnreadableImage:
            process = idle.get()
            try:
                _, image, mask = jobs[number]
                return process.run("look", image=image, mask=mask, side=PICTURE_SIDE if number in shown else 0)
            except UnreadableImage as error:
                return error
            finally:
                idle.put(process)

        pool = ThreadPoolExecutor(processes)  # its threads only wait for the processes
        stack.callback(pool.shutdown, cancel_futures=True)
        for number, outcome in enumerate(_in_order(pool, one, len(jobs), AHEAD * processes)):
            if isinstance(outcome, UnreadableImage):
                seen.unreadable[jobs[number][0]] = str(outcome)
            else:
                _add_(seen, number, jobs[number][0], outcome)
            if progress is not None:
                progress("looking", number + 1, len(jobs))


def _in_order(pool: ThreadPoolExecutor, one: Callable[[int], Any], count: int, ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for number in range(count):
        waiting.append(pool.submit(one, number))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _add_(seen: Seen, number: int, row: int, arrays: dict[str, NDArray[Any]]) -> None:
    """Add one image."""
    facts, patient = json.loads(arrays["facts"].tobytes()), int(seen.patients[row])
    seen.thumbnails[number] = arrays["thumbnail"]
    if len(arrays["fingerprint"]):
        seen.prints[number] = int.from_bytes(arrays["fingerprint"].tobytes())
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
    seen.sizes.append(float(max(facts["size"][-2:])))
    for mark, odd in (
        ("identified", facts.get("identified") and facts.get("named")),
        ("unmarked", facts.get("identified") and not facts.get("named")),
        (f"quarantine: {facts.get('quarantine')}", facts.get("quarantine")),
        ("secondary capture", facts.get("capture")),
        ("several frames", facts.get("frames", 1) > 1),
        (f"mask: {facts.get('mask')}", facts.get("mask")),
    ):
        if odd:
            seen.marks.setdefault(mark, []).append(row)
    if arrays["picture"].size:
        buffer = io.BytesIO()
        Image.fromarray(arrays["picture"]).save(buffer, "JPEG", quality=75)
        seen.pictures.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def _facts(seen: Seen, manifest: Path, found: Sequence[Finding], alike: Alike, ages: list[float]) -> dict[str, Any]:
    images_of_patient = np.bincount(seen.patients).astype(float).tolist()
    return {
        "schema": SCHEMA,
        "fedmed": fedmed.__version__,
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "state": verdict(found),
        "findings": [finding.facts() for finding in found],
        "patients": len(images_of_patient),
        "rows": len(seen.rows),
        "images": seen.images,
        "masks": seen.masked,
        "near_duplicates": alike.count,
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
                ("age, years", ages),
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
    return {"counts": counts.tolist(), "edges": [round(float(edge), 4) for edge in edges]}


def _is_label(records: Sequence[dict[str, str]], name: str) -> bool:
    values = {record[name] for record in records}
    return bool(values - {""}) and values <= {"", "0", "1", "0.0", "1.0"}


def _values(records: Sequence[dict[str, str]], name: str) -> NDArray[np.int8]:
    meaning = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
    return np.array([meaning.get(record[name], -1) for record in records], np.int8)


def _numbers(texts: Iterator[str]) -> NDArray[np.int64]:
    """Texts as numbers, equal ones equal."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(text, len(known)) for text in texts], np.int64)
