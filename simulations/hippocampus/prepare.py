"""Deal the hippocampus volumes to three hospitals and the server.

`python prepare.py DATA OUT` reads `DATA/vol3d/dev/metadata.csv` and writes, copying no image, `OUT/run.toml` and a
manifest for each of three sites and the server, a quarter of the patients each, in the order of a hash of their ids.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from manifests import Manifests, command, dealt, found, read_metadata  # noqa: E402  # lies beside the simulations

NAMES = ("site-1", "site-2", "site-3", "server")


def manifests(data: Path) -> Manifests:
    """The rows of every manifest."""
    root = data / "vol3d"
    records = read_metadata(root / "dev" / "metadata.csv", "msd_hippocampus", ("task", "image", "label"))
    rows = [
        {
            "patient_id": record["patient_id"],
            "image": found(root / record["image"]),
            "mask": found(root / record["label"]),
        }
        for record in records
    ]
    return dict(zip(NAMES, dealt(rows, len(NAMES)), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the manifests and the run file; returns the exit status."""
    return command(FOLDER, manifests, arguments, expected="vol3d/dev")


if __name__ == "__main__":
    sys.exit(main())
