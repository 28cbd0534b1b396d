"""Turn a folder of real chest X-rays into the hospitals of three comparisons.

`python prepare.py DATA OUT` writes, copying no image, `OUT/classification/`, `OUT/nih/` and `OUT/lungs/`, each with a
`run.toml` and a `<site>/manifest.csv` per hospital. It reads the same files as `simulations/real-cxr/prepare.py`.
There is no server's set: every hospital's own held-out patients judge.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import tomli_w

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))

from chest_xrays import (  # noqa: E402  # lies beside the simulations
    ABOUT,
    COVID_HOSPITALS,
    binary,
    manifest_row,
    masked_row,
    of_hospital,
    split_patients,
)
from manifests import BadData, read_metadata, write  # noqa: E402  # lies beside the simulations

NIH_SITES = ("nih-1", "nih-2", "nih-3", "nih-4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all federations; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Write the manifests and run files of the comparisons. No image is copied.",
        epilog="example: python prepare.py path/to/data out && fedmed compare out/lungs/run.toml",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder that holds cxr/dev and seg2d/dev")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; existing manifests are replaced")
    options = parser.parse_args(arguments)
    try:
        write_studies(options.data, options.out)
    except (BadData, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_studies(data: Path, out: Path) -> None:
    """Write a folder for each comparison.

    Raises:
        BadData: what is missing, in one line.
    """
    every = classification(data)
    studies = (
        ("classification", "classification.toml", every),
        ("nih", "classification.toml", {site: every[site] for site in NIH_SITES}),
        ("lungs", "lungs.toml", lungs(data)),
    )
    for name, run_file, manifests in studies:
        write(out / name, manifests)
        values = tomllib.loads((HERE / run_file).read_text(encoding="utf-8"))
        values["data"]["sites"] = [f"{site}/manifest.csv" for site in manifests]
        (out / name / "run.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        for site, rows in manifests.items():
            print(f"{name}/{site}: {len({row['patient_id'] for row in rows})} patients, {len(rows)} images")


def classification(data: Path) -> dict[str, list[dict[str, str]]]:
    """NIH patients at four sites, in the order of their hashes, and the five COVID-19 collections."""
    root = data / "cxr"
    records = read_metadata(root / "dev" / "metadata.csv", "", ("hospital", "path", "Pneumonia_any", *ABOUT))
    nih = of_hospital(records, "nih_cc")
    first, rest = split_patients(nih)
    place = dict.fromkeys(first, 0) | {patient: 1 + number % 3 for number, patient in enumerate(rest)}
    rows = {site: [row for row in nih if place[row["patient_id"]] == number] for number, site in enumerate(NIH_SITES)}
    rows |= {hospital: of_hospital(records, hospital) for hospital in COVID_HOSPITALS}
    return {
        site: [manifest_row(row, root, {"Pneumonia": binary(row["Pneumonia_any"])}) for row in mine]
        for site, mine in rows.items()
    }


def lungs(data: Path) -> dict[str, list[dict[str, str]]]:
    """Every hospital of which the data hold lung masks."""
    root = data / "seg2d"
    records = read_metadata(root / "dev" / "metadata.csv", "cxr_lungs", ("task", "hospital", "image", "mask"))
    hospitals = sorted({record["hospital"] for record in records})
    return {hospital: [masked_row(row, root) for row in of_hospital(records, hospital)] for hospital in hospitals}


if __name__ == "__main__":
    sys.exit(main())
