"""Pixel error and Dice of membranes at full resolution, fold by fold, from the masks that `fedmed predict` writes.

`python score.py OUT RUN...` takes the folder that prepare.py wrote and the run folders of its folds in order. A run's
own Dice is that of cells on the grid of the network; here masks are compared with the truth in the size of the images.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def main(arguments: Sequence[str]) -> int:
    """Print a table; returns the exit status."""
    if len(arguments) < 2:
        print("usage: python score.py OUT RUN...", file=sys.stderr)
        return 2
    out, runs = Path(arguments[0]), [Path(run) for run in arguments[1:]]
    print("| fold | slices | pixel error | Dice of membranes | Dice of cells |\n|---|---|---|---|---|")
    scores = []
    for fold, run in enumerate(runs, start=1):
        server = out / f"fold-{fold}" / "server"
        with (server / "manifest.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found = predicted(run, [server / row["image"] for row in rows])
        truth = [np.asarray(Image.open(server / row["mask"])) > 0 for row in rows]
        scores.append(np.mean([score(*pair) for pair in zip(found, truth, strict=True)], axis=0))
        print(f"| {fold} | {len(rows)} | " + " | ".join(f"{value:.3f}" for value in scores[-1]) + " |")
    if len(scores) > 1:
        spread = [f"{np.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in zip(*scores, strict=True)]
        print(f"| mean ± standard deviation | | {' | '.join(spread)} |")
    return 0


def predicted(run: Path, images: Sequence[Path]) -> list[np.ndarray]:
    """(H, W) where the kept network sees a cell, of every image."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "predictions"
        command = [sys.executable, "-m", "fedmed", "predict", run, *images, "--out", place, "--json", "--quiet"]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        masks = [
            next(drawn["file"] for drawn in image["files"] if drawn["what"] == "mask")
            for image in json.loads(answer.stdout)["images"]
        ]
        return [np.asarray(Image.open(place / mask)) > 0 for mask in masks]


def score(found: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Share of wrong pixels, Dice of membranes (the background of the mask), Dice of cells."""
    return float((found != truth).mean()), dice(~found, ~truth), dice(found, truth)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|), of which neither is empty here."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
