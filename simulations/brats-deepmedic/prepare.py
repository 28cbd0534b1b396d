"""Leave one out: for each of the BraTS patients a federation of all others, judged on that patient.

`python prepare.py DATA OUT` reads `DATA/vol3d/dev/metadata.csv` and writes, copying no image, `OUT/fold-1/` and so on:
a `run.toml`, a hospital for every patient but one, and a server with that one. The modalities are FLAIR and T1c, in
this order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from manifests import MODALITIES, Manifests, command, dealt, found, read_metadata  # noqa: E402  # beside this folder

CHANNELS = ("flair.nii.gz", "t1c.nii.gz")
FOLDS = 4  # of one patient each


def manifests(data: Path) -> Manifests:
    """The rows of every manifest, as "fold-1/site-1", …, "fold-1/server"."""
    root = data / "vol3d"
    records = read_metadata(root / "dev" / "metadata.csv", "brats2013_2mm", ("task", "image", "label"))
    rows = [
        {
            "patient_id": record["patient_id"],
            "image": MODALITIES.join(found(root / record["image"] / name) for name in CHANNELS),
            "mask": found(root / record["label"]),
            "split": "train",  # a hospital of one patient holds nobody back
        }
        for record in records
    ]
    patients = dealt(rows, FOLDS)
    whole = {}
    for fold in range(FOLDS):
        sites = [part for number, part in enumerate(patients) if number != fold]
        whole |= {f"fold-{fold + 1}/site-{number}": part for number, part in enumerate(sites, start=1)}
        whole[f"fold-{fold + 1}/server"] = [{**row, "split": "test"} for row in patients[fold]]
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the manifests and the run files; returns the exit status."""
    run_files = [f"fold-{fold + 1}/run.toml" for fold in range(FOLDS)]
    return command(FOLDER, manifests, arguments, expected="vol3d/dev", run_files=run_files)


if __name__ == "__main__":
    sys.exit(main())
