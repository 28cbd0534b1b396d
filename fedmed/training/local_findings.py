"""A site's own findings: its data, and the final network at its own held-out patients, with pictures.

`findings.json` lies in the site's state folder and is never sent; `fedmed report` makes a page of it. Written by the
same function in simulation and at a hospital. As nothing of it leaves, nothing in it is suppressed or noised.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.config import RunConfig
from fedmed.durable import make_private, write_atomically
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.scanners import scanner_counts
from fedmed.metrics import classification_intervals, join_cases, label_counts, probabilities, segmentation_intervals
from fedmed.training.case_pictures import KEPT, Case, Extremes
from fedmed.training.evaluate import predictions, scored_cases
from fedmed.training.network import FlatNetwork

FILE = "findings.json"
FILE_MODE = 0o600  # it shows patients
SCHEMA = 1


def write_findings(
    folder: Path, name: str, manifest: Path | None, config: RunConfig, data: Dataset, network: FlatNetwork, round: int
) -> None:
    """Write `findings.json`, whole or not at all, readable by its owner alone.

    Args:
        folder: the site's state folder.
        name: of the site.
        manifest: the site's CSV, for the headers of its images; None if its data are no image files.
        config: of the run.
        data: the site's images.
        network: the final network, loaded.
        round: after which it was kept.
    """
    make_private(folder)
    content = json.dumps(findings(name, manifest, config, data, network, round), allow_nan=False)
    write_atomically(folder / FILE, content.encode(), mode=FILE_MODE)


def findings(
    name: str, manifest: Path | None, config: RunConfig, data: Dataset, network: FlatNetwork, round: int
) -> dict[str, Any]:
    """The content of `findings.json`; see `write_findings`."""
    rows = np.flatnonzero(data.evaluation)
    judged = (
        _segmented(config, data, network, rows)
        if config.task.kind == "segmentation"
        else _classified(config, data, network, rows)
    )
    machines: Counter[str] = Counter()
    if manifest is not None:
        used = set(data.rows.tolist())
        machines = scanner_counts(
            [row for row in read_manifest(manifest, config.task, lenient=True).rows if row.number in used]
        )
    return {
        "schema": SCHEMA,
        "site": name,
        "run": config.name,
        "model": config.model.name,
        "task": config.task.kind,
        "labels": list(config.task.labels),
        "primary": config.primary,
        "round": round,
        "patients": len(set(data.patients)),
        "images": len(set(data.rows.tolist())),
        "items": len(data),
        "held_out": {"patients": len({data.patients[row] for row in rows}), "items": len(rows)},
        "unreadable": {"images": len(data.unreadable), "reasons": dict(data.reasons)},
        "scanners": [{"scanner": scanner, "images": count} for scanner, count in machines.most_common()],
        **judged,
    }


def _classified(config: RunConfig, data: Dataset, network: FlatNetwork, rows: NDArray[np.int64]) -> dict[str, Any]:
    labels = config.task.labels
    known = np.asarray(data.targets) if isinstance(data.targets, np.ndarray) else np.zeros((0, len(labels)))
    prevalence = label_counts(known, labels)
    if not len(rows):
        return {"prevalence": prevalence, "metrics": {}, "pictures": []}
    batches = list(predictions(network, data, rows))
    logits, targets = (np.concatenate([batch[part] for batch in batches]) for part in (1, 2))
    patients = [data.patients[row] for row in rows]
    metrics = classification_intervals(
        logits, targets, patients, labels, config.evaluate.bootstrap, np.random.default_rng(config.seed)
    )
    pictures = _surprises(rows, logits, targets, labels).pictures(data) if _drawable(data) else []
    found = {name: interval.to_json() for name, interval in metrics.items()}
    return {"prevalence": prevalence, "metrics": found, "pictures": pictures}


def _segmented(config: RunConfig, data: Dataset, network: FlatNetwork, rows: NDArray[np.int64]) -> dict[str, Any]:
    if not len(rows):
        return {"prevalence": {}, "metrics": {}, "pictures": []}
    labels, extremes, scored, patients = config.task.labels, Extremes(), [], []
    for chosen, logits, targets in predictions(network, data, rows):
        scored.append(cases := scored_cases(logits, targets, config.scored_spacing_mm))
        patients += [data.patients[row] for row in chosen]
        extremes.add(chosen, cases.dice.mean(axis=1), logits, targets)
    cases = join_cases(scored)
    metrics = segmentation_intervals(
        cases, patients, labels, config.evaluate.bootstrap, np.random.default_rng(config.seed)
    )
    found = {name: interval.to_json() for name, interval in metrics.items()}
    return {"prevalence": cases.label_counts(labels), "metrics": found, "pictures": extremes.pictures(data)}


def _surprises(
    rows: NDArray[np.int64], logits: NDArray[np.float32], targets: NDArray[np.float32], labels: tuple[str, ...]
) -> Extremes:
    """The images whose labels the network got most wrong, and most right: by the worst label of each."""
    probability = probabilities(logits)  # (N, L)
    right = np.where(np.isnan(targets), np.inf, 1 - np.abs(probability - np.nan_to_num(targets)))
    scores, label = right.min(axis=1), right.argmin(axis=1)
    order = [int(k) for k in np.argsort(scores, kind="stable") if np.isfinite(scores[k])]
    cases = [
        Case(
            row=int(rows[k]),
            score=float(scores[k]),
            outcome=f"{labels[label[k]]}: {'present' if targets[k, label[k]] == 1 else 'absent'}, "
            f"predicted {probability[k, label[k]]:.2f}",
        )
        for k in order
    ]
    extremes = Extremes()
    extremes.offer(cases[:KEPT], cases[-KEPT:])
    return extremes


def _drawable(data: Dataset) -> bool:
    """Whether items look like pictures or volumes: a user's own data set may hold anything."""
    return data.batch(np.array([0]))[0].ndim in (4, 5)
