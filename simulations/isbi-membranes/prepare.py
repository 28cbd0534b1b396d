"""Five folds of the ISBI-2012 slices: for each a federation of the four others, judged on that fold.

`python prepare.py DATA OUT` reads `DATA/seg2d/dev/metadata.csv` and writes, copying no image, `OUT/fold-1/` and so on:
a `run.toml`, four sites and a server. Slices are of one stack, and neighbours look alike: a fold is a run of
neighbours, so that no slice but those at its two ends has a neighbour that was trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from manifests import Manifests, command, found, read_metadata  # noqa: E402  # lies beside the simulations

FOLDS = 5


def manifests(data: Path) -> Manifests:
    """The rows of every manifest, as "fold-1/site-1", …, "fold-1/server"."""
    root = data / "seg2d"
    records = read_metadata(root / "dev" / "metadata.csv", "isbi2012_membrane", ("task", "image", "mask"))
    rows = [
        {
            "patient_id": record["patient_id"],  # of a slice: all are of one larva
            "image": found(root / record["image"]),
            "mask": found(root / record["mask"]),
            "split": "train",  # a site holds no slice back
        }
        for record in sorted(records, key=lambda record: record["patient_id"])
    ]
    folds = [rows[len(rows) * fold // FOLDS : len(rows) * (fold + 1) // FOLDS] for fold in range(FOLDS)]
    whole = {}
    for out in range(FOLDS):
        sites = [part for number, part in enumerate(folds) if number != out]
        whole |= {f"fold-{out + 1}/site-{number}": part for number, part in enumerate(sites, start=1)}
        whole[f"fold-{out + 1}/server"] = [{**row, "split": "test"} for row in folds[out]]
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the manifests and the run files; returns the exit status."""
    run_files = [f"fold-{fold + 1}/run.toml" for fold in range(FOLDS)]
    return command(FOLDER, manifests, arguments, expected="seg2d/dev", run_files=run_files)


if __name__ == "__main__":
    sys.exit(main())
