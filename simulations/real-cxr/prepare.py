"""Turn a folder of real chest X-rays into the manifests and run files of two federations.

`python prepare.py DATA OUT` reads `DATA/cxr/dev/metadata.csv` and `DATA/seg2d/dev/metadata.csv` and writes, copying no
image, `OUT/classification/` and `OUT/lungs/`: a `run.toml`, a `server/manifest.csv`, and one `<site>/manifest.csv` per
hospital. Whoever is in one of the manifests of a federation is in no other of it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))

from chest_xrays import (  # noqa: E402  # lies beside the simulations
    ABOUT,
    COVID_HOSPITALS,
    NIH_LABELS,
    binary,
    manifest_row,
    masked_row,
    of_hospital,
    split_patients,
)
from manifests import BadData, Record, read_metadata, write  # noqa: E402  # lies beside the simulations

NIH_SITES = ("nih-1", "nih-2", "nih-3")
LUNG_HOSPITALS = ("hannover_mhh", "covid_world", "covid_spain", "covid_italy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both federations; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Write the manifests and run files of the two real-cxr federations. No image is copied.",
        epilog="example: python prepare.py path/to/data out && fedmed simulate out/lungs/run.toml --out runs/lungs",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder that holds cxr/dev and seg2d/dev")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; existing manifests are replaced")
    options = parser.parse_args(arguments)
    try:
        federations = {"classification": classification(options.data), "lungs": lungs(options.data)}
        for name, manifests in federations.items():
            write(options.out / name, manifests)
            shutil.copyfile(HERE / f"{name}.toml", options.out / name / "run.toml")
    except (BadData, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, manifests in federations.items():
        for site, rows in manifests.items():
            patients = len({row["patient_id"] for row in rows})
            print(f"{name}/{site}: {patients} patients, {len(rows)} images")
    return 0


def classification(data: Path) -> dict[str, list[Record]]:
    """The rows of every manifest of the classification: NIH in three sites and the server's set, and five hospitals.

    NIH annotates 14 findings. Elsewhere only pneumonia of any kind is known; the 13 other cells stay empty.
    """
    root = data / "cxr"
    records = read_metadata(
        root / "dev" / "metadata.csv", "", ("hospital", "path", "Pneumonia_any", *ABOUT, *NIH_LABELS)
    )
    nih = of_hospital(records, "nih_cc")
    server, rest = split_patients(nih)
    site_of = {patient: NIH_SITES[index % len(NIH_SITES)] for index, patient in enumerate(rest)}
    manifests = {site: [row for row in nih if site_of.get(row["patient_id"]) == site] for site in NIH_SITES}
    manifests["server"] = [row for row in nih if row["patient_id"] in server]
    manifests = {
        site: [manifest_row(row, root, {label: binary(row[label]) for label in NIH_LABELS}) for row in rows]
        for site, rows in manifests.items()
    }
    for hospital in COVID_HOSPITALS:
        manifests[hospital] = [
            manifest_row(row, root, dict.fromkeys(NIH_LABELS, "") | {"Pneumonia": binary(row["Pneumonia_any"])})
            for row in of_hospital(records, hospital)
        ]
    return manifests


def lungs(data: Path) -> dict[str, list[Record]]:
    """The rows of every manifest of the lung segmentation: four hospitals, and the server's set from all of them."""
    root = data / "seg2d"
    records = read_metadata(root / "dev" / "metadata.csv", "cxr_lungs", ("task", "hospital", "image", "mask"))
    manifests: dict[str, list[Record]] = {"server": []}
    for hospital in LUNG_HOSPITALS:
        rows = of_hospital(records, hospital)
        server, _ = split_patients(rows)
        manifests[hospital] = []
        for row in rows:
            place = "server" if row["patient_id"] in server else hospital
            manifests[place].append(masked_row(row, root) | {"site": hospital})
    return manifests


if __name__ == "__main__":
    sys.exit(main())
