"""Time and memory of importing and checking a large manifest, by CPU time.

    python benchmarks/intake.py                  # 100,000 rows: some minutes of CPU
    python benchmarks/intake.py --rows 10000

A table in the form of NIH's names that many pictures of 256 × 256, hard links to 500 different ones, each of which is
opened and decoded as if it were another one. CPU time counts this process and its children; memory
is the peak of this process and that of its largest child.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from fedmed.imaging.phantoms.chest import chest
from fedmed.intake.check import check
from fedmed.intake.importing import Rules, import_images
from fedmed.intake.kinds.nih import LABELS
from fedmed.intake.near_duplicates import near_duplicates
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import make_keys

SIDE, DIFFERENT, A_FOLDER = 256, 500, 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"`python benchmarks/intake.py --rows {options.rows}`, {cores} cores, {platform.machine()}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_archive(folder / "nih", options.rows)
        pseudonyms = Pseudonyms(keys=make_keys(folder / "keys"))
        print(f"| what, {options.rows:,} rows | CPU s | wall s | peak MiB, this process | peak MiB, a child |")
        print("|---|---|---|---|---|", flush=True)
        measured("import", lambda: import_images("nih", folder / "nih", folder / "out", Rules(pseudonyms=pseudonyms)))
        measured("check, near-duplicates included", lambda: check(folder / "out" / "manifest.csv"))
        thumbnails = np.random.default_rng(1).integers(0, 256, (options.rows, 24, 24), dtype=np.uint8)
        numbers = np.arange(options.rows)
        measured("near-duplicates alone", lambda: near_duplicates(thumbnails, numbers, numbers))


def make_archive(folder: Path, rows: int) -> None:
    """Pictures and their table; copies of a picture are of one patient, so that the check finds nothing to list."""
    rng = np.random.default_rng(7)
    (folder / "different").mkdir(parents=True)
    for number in range(min(rows, DIFFERENT)):
        present = dict.fromkeys(("nodule", "cavity", "reticulation", "consolidation"), bool(number % 2))
        picture = chest((SIDE, SIDE), present, rng).picture + 0.02 * rng.standard_normal((SIDE, SIDE), dtype=np.float32)
        Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8)).save(folder / "different" / f"{number}.png")
    with (folder / "Data_Entry_2017.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position"]
        )
        for number in range(rows):
            place = folder / f"images_{number // A_FOLDER}" / f"{number:08}_000.png"
            place.parent.mkdir(exist_ok=True)
            os.link(folder / "different" / f"{number % DIFFERENT}.png", place)
            table.writerow(
                [place.name, LABELS[number % 14], number % DIFFERENT, 20 + number % 70, "MF"[number % 2], "PA"]
            )


def measured(what: str, work: Callable[[], object]) -> None:
    """Do it, and print a row of the table."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    before, started = [resource.getrusage(kind) for kind in kinds], time.perf_counter()
    work()
    wall, after = time.perf_counter() - started, [resource.getrusage(kind) for kind in kinds]
    cpu = sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))
    own, child = (each.ru_maxrss / 1024 for each in after)
    print(f"| {what} | {cpu:.1f} | {wall:.0f} | {own:.0f} | {child:.0f} |", flush=True)


if __name__ == "__main__":
    main()
