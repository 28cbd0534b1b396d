"""Heart disease at four hospitals: a logistic regression, and the rows of each hospital as a data set of one's own.

`data.sites` names a hospital as `TABLE.csv/HOSPITAL`. `TABLE.csv/tune/HOSPITAL` is the same hospital without its
held-out patients, a quarter of the others held out instead: for choosing settings without a look at who judges them.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from torch import nn

from fedmed.config import RunConfig
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.split import held_out

NUMBERS = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
CHOICES = {"cp": (2, 3, 4), "restecg": (1, 2)}  # one column for each value but the first
FEATURES = len(NUMBERS) + sum(map(len, CHOICES.values()))  # 13, those of Fed-Heart-Disease in FLamby
YES_OR_NO = (0.5, 0.5)  # 0 and 1 become -1 and 1
# Middle and width of each number in adults, round figures from no patient of the tables: years, mmHg, mg/dl, 1/min, mm.
# The same at every hospital, for a hospital's own mean would take away how ill its patients are.
SCALES = {
    "age": (55.0, 10.0),
    "sex": YES_OR_NO,
    "trestbps": (130.0, 20.0),
    "chol": (200.0, 100.0),
    "fbs": YES_OR_NO,
    "thalach": (140.0, 25.0),
    "exang": YES_OR_NO,
    "oldpeak": (1.0, 1.0),
}
TUNING_SHARE = 0.25


def network(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """Logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, outputs))


def dataset(path: Path, config: RunConfig) -> Dataset:
    """One hospital's patients without a missing value."""
    tuning = path.parent.name == "tune"
    table = path.parent.parent if tuning else path.parent
    rows = [row for row in _rows(table) if row["hospital"] == path.name and not _missing(row)]
    patients = tuple(f"{path.name}-{row['row']}" for row in rows)
    out = held_out(patients, share=config.evaluate.site_share, seed=config.split_seed, name=path.name)
    if tuning:
        rows = [row for row, judge in zip(rows, out, strict=True) if not judge]
        patients = tuple(f"{path.name}-{row['row']}" for row in rows)
        out = held_out(patients, share=TUNING_SHARE, seed=config.split_seed, name=f"tune/{path.name}")
    values = np.array([_features(row) for row in rows])  # (N, 13)
    return Dataset(
        images=values.astype(np.float32)[:, None, None, :],
        targets=np.array([[float(row["target"])] for row in rows], np.float32),
        patients=patients,
        evaluation=out,
    )


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _missing(row: dict[str, str]) -> bool:
    return any(not row[name] for name in (*NUMBERS, *CHOICES))


def _features(row: dict[str, str]) -> list[float]:
    numbers = [(float(row[name]), *SCALES[name]) for name in NUMBERS]
    chosen = [(float(float(row[name]) == value), *YES_OR_NO) for name, values in CHOICES.items() for value in values]
    return [(value - middle) / width for value, middle, width in numbers + chosen]
