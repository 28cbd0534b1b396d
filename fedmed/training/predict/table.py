"""Predictions as a CSV, written row by row, and as JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedmed.training.predict.batch import GATES, Drawn, Prediction
from fedmed.training.predict.kept import Kept

FILE = "predictions.csv"


class Writer(Protocol):
    """Adds one row."""

    def __call__(self, prediction: Prediction) -> None:
        """Write a prediction."""


@contextmanager
def csv_writer(kept: Kept, folder: Path, *, heat_maps: bool) -> Iterator[Writer]:
    """Open predictions.csv; every row is on disk at once, so that an interrupted batch keeps what it did.

    Columns: number, image; of a classifier a probability per label, and with heat maps heat_map/LABEL; of a
    segmentation pixels/LABEL, in 3D ml/LABEL, mask, overlay, and with heat maps gate-1 to gate-3; and error. In 3D
    another column says which slice a picture shows, such as heat_map/LABEL/slice.
    """
    with (folder / FILE).open("x", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, columns(kept, heat_maps=heat_maps))
        rows.writeheader()

        def write(prediction: Prediction) -> None:
            rows.writerow(_row(prediction))
            file.flush()

        file.flush()
        yield write


def columns(kept: Kept, *, heat_maps: bool) -> list[str]:
    """The header of predictions.csv."""
    volumes = kept.recipe.items != "images"
    if kept.segments:
        drawn = ["mask", *_pictured("overlay", volumes=volumes)]
        drawn += [name for gate in GATES for name in _pictured(gate, volumes=volumes)] if heat_maps else []
        sizes = [f"pixels/{label}" for label in kept.labels]
        sizes += [f"ml/{label}" for label in kept.labels] if volumes else []
        return ["number", "image", *sizes, *drawn, "error"]
    drawn = [name for label in kept.labels for name in _pictured(f"heat_map/{label}", volumes=volumes)]
    return ["number", "image", *map(_probability, kept.labels), *(drawn if heat_maps else []), "error"]


def as_json(prediction: Prediction, *, segments: bool) -> dict[str, Any]:
    """A prediction as plain values; null for what an image with an error has not."""
    facts: dict[str, Any] = {"number": prediction.number, "image": prediction.image}
    if segments:
        facts |= {"pixels": dict(prediction.voxels) or None, "ml": _millilitres(prediction) or None}
    else:
        facts |= {"probabilities": dict(prediction.probabilities) or None}
    files = [{"what": each.what, "file": each.file, "slice": each.slice} for each in prediction.drawn]
    return {**facts, "files": files, "error": prediction.error or None}


def _probability(label: str) -> str:
    """The column of a label: its name, unless another column has it."""
    return f"probability/{label}" if label in ("number", "image", "error") else label


def _pictured(name: str, *, volumes: bool) -> list[str]:
    return [name, f"{name}/slice"] if volumes else [name]


def _row(prediction: Prediction) -> dict[str, object]:
    row: dict[str, object] = {"number": prediction.number, "image": prediction.image, "error": prediction.error}
    row |= {_probability(label): f"{value:.6f}" for label, value in prediction.probabilities.items()}
    row |= {f"pixels/{label}": count for label, count in prediction.voxels.items()}
    row |= {f"ml/{label}": f"{value:.4f}" for label, value in _millilitres(prediction).items()}
    for each in prediction.drawn:
        row.setdefault(_column(each, prediction), each.file)  # of the masks of a cine, the first
        if each.slice is not None and each.what != "mask":
            row[f"{_column(each, prediction)}/slice"] = each.slice
    return row


def _column(drawn: Drawn, prediction: Prediction) -> str:
    return f"heat_map/{drawn.what}" if prediction.probabilities else drawn.what


def _millilitres(prediction: Prediction) -> dict[str, float]:
    if prediction.voxel_ml is None:
        return {}
    return {label: count * prediction.voxel_ml for label, count in prediction.voxels.items()}
