"""Deal the NIH chest X-rays to three hospitals and the server.

`python prepare.py DATA OUT` reads `DATA/cxr/dev/metadata.csv` and writes, copying no image, `OUT/run.toml` and a
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
LABELS = ("Effusion", "Infiltration", "Pneumonia", "Edema", "Atelectasis")  # of the others the server has a handful


def manifests(data: Path) -> Manifests:
    """The rows of every manifest."""
    root = data / "cxr"
    records = read_metadata(root / "dev" / "metadata.csv", "", ("hospital", "path", *LABELS))
    rows = [
        {"patient_id": record["patient_id"], "image": found(root / record["path"])}
        | {label: str(int(float(record[label]))) for label in LABELS}
        for record in records
        if record["hospital"] == "nih_cc"
    ]
    return dict(zip(NAMES, dealt(rows, len(NAMES)), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the manifests and the run file; returns the exit status."""
    return command(FOLDER, manifests, arguments, expected="cxr/dev")


if __name__ == "__main__":
    sys.exit(main())
