"""Run folders as reports read them, and a report as a test reads it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from fedmed.reporting import write_report

Json = dict[str, object]
SECTIONS = [
    "metrics", "data", "rounds", "per-site", "cases", "participation", "sites", "training", "facts", "repeat",
]  # fmt: skip
PLOTS = [
    "plot-rounds", "plot-sites", "plot-labels", "plot-cases", "plot-precision-recall", "plot-calibration",
    "plot-participation",
]  # fmt: skip
PICTURE = "data:image/webp;base64,UklGRg=="


def estimate(value: float | None, spread: float = 0.03, patients: int | None = 120) -> Json:
    if value is None:
        return {"value": None, "low": None, "high": None, "n": patients}
    return {"value": value, "low": value - spread, "high": value + spread, "n": patients}


def site(name: str, auroc: float | None, **changes: object) -> Json:
    row: Json = {"site": name, "patients": 80, "images": 200, "rounds_joined": 5, "privacy": None}
    metrics = {"auroc": estimate(auroc, 0.05, 16), "auroc/nodule": estimate(auroc, 0.05, 16), "loss": estimate(0.5)}
    return row | {"metrics": metrics} | changes


def entry(round_: int, joined: list[str], failed: dict[str, str], auroc: float | None = 0.8) -> Json:
    return {
        "round": round_,
        "joined": joined,
        "failed": [{"site": name, "reason": reason} for name, reason in failed.items()],
        "seconds": 9.1,
        "server_metrics": {"auroc": estimate(auroc), "loss": estimate(0.9 - 0.08 * round_)},
    }


def result(**changes: object) -> Json:
    names = [f"site-{i}" for i in range(1, 5)]
    log = [entry(0, [], {}, 0.51)]
    log += [entry(i, names, {}, 0.6 + 0.06 * i) for i in range(1, 6)]
    base: Json = {
        "schema": 1,
        "run_id": "run-0001",
        "name": "quickstart",
        "status": "completed",
        "reason": None,
        "model": "chexnet",
        "task": "classification",
        "strategy": "fedavg",
        "rounds": 5,
        "seed": 7,
        "versions": {"fedmed": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0"},
        "server": {
            "metrics": {
                "loss": estimate(0.41),
                "auroc": estimate(0.91),
                "auroc/nodule": estimate(0.93),
                "auroc/effusion": estimate(None),
            }
        },
        "sites": [site(name, 0.85 + 0.02 * place) for place, name in enumerate(names)],
        "rounds_log": log,
        "timing": {"total_s": 62.5, "train_s": 51.0, "overhead_s": 3.2},
        "peak_memory_mib": 1530.4,
    }
    return base | changes


EVALUATION: Json = {
    "kind": "classification",
    "labels": ["nodule", "effusion"],
    "patients": 120,
    "images": 300,
    "counts": {"nodule": {"positives": 90, "negatives": 200}, "effusion": {"positives": 0, "negatives": 300}},
    "curves": {
        "nodule": {"false_positive_rate": [0.0, 0.1, 0.4, 1.0], "true_positive_rate": [0.0, 0.7, 0.95, 1.0]}
        | {"at": [0.0, 0.5, 1.0], "low": [0.0, 0.9, 1.0], "high": [0.4, 1.0, 1.0]},
        "effusion": None,
    },
    "precision_recall": {
        "nodule": {"recall": [0.1, 0.6, 1.0], "precision": [1.0, 0.8, 0.3]}
        | {"at": [0.0, 0.5, 1.0], "low": [0.7, 0.6, 0.2], "high": [1.0, 1.0, 0.4]},
        "effusion": None,
    },
    "calibration": {
        "nodule": {"probability": [0.1, 0.5, 0.9], "observed": [0.05, 0.4, 0.95], "images": [150, 60, 80]}
        | {"low": [0.0, 0.3, 0.8], "high": [0.1, 0.6, 1.0]},
        "effusion": {"probability": [0.1], "observed": [0.0], "images": [300]},
    },
    "thresholds": {
        "nodule": {
            "probability": 0.31,
            "chosen": True,
            "true_positives": 80,
            "false_negatives": 10,
            "false_positives": 25,
            "true_negatives": 175,
            "rates": {
                "sensitivity": estimate(0.889),
                "specificity": estimate(0.875),
                "positive-predictive-value": estimate(0.762),
                "negative-predictive-value": estimate(0.946),
            },
        }
    },
}


def write_run(folder: Path, facts: Json, evaluation: Json | None = None, events: list[Json] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(facts))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


class Page(HTMLParser):
    """Elements, their attributes, figures and visible text of a report, without plotly's own source."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, Json] = {}
        self.styles = ""
        self._open = ""
        self._figure: str | None = None
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._open = tag
        self._figure = dict(attrs).get("data-plot")

    def handle_endtag(self, tag: str) -> None:
        self.text += " "
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            if self._figure:
                self.figures[self._figure] = json.loads(data)
        elif self._open == "style":
            self.styles += data
        else:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.tags if name == tag and "id" in attributes]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))
