"""Turn a folder of real chest X-rays into the manifests and run files of two federations.

`python prepare.py DATA OUT` reads `DATA/cxr/dev/metadata.csv` and `DATA/seg2d/dev/metadata.csv` and writes, copying no
image, `OUT/classification/` and `OUT/lungs/`: a `run.toml`, a `server/manifest.csv`, and one `<site>/manifest.csv` per
hospital. Whoever is in one of the manifests of a federation is in no other of it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

NIH_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NIH_SITES = ("nih-1", "nih-2", "nih-3")
COVID_HOSPITALS = ("hannover_mhh", "covid_italy", "covid_spain", "covid_australia", "covid_world")
LUNG_HOSPITALS = ("hannover_mhh", "covid_world", "covid_spain", "covid_italy")
ABOUT = ("view", "age", "sex")
SERVER_SHARE = 0.25  # of the patients

Record = Mapping[str, str]


class BadData(Exception):
    """What is missing, in one line."""


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
            shutil.copyfile(Path(__file__).with_name(f"{name}.toml"), options.out / name / "run.toml")
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
    records = read_metadata(root / "dev" / "metadata.csv", ("hospital", "path", "Pneumonia_any", *ABOUT, *NIH_LABELS))
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
    records = read_metadata(root / "dev" / "metadata.csv", ("task", "hospital", "image", "mask"))
    manifests: dict[str, list[Record]] = {"server": []}
    for hospital in LUNG_HOSPITALS:
        rows = of_hospital([record for record in records if record["task"] == "cxr_lungs"], hospital)
        server, _ = split_patients(rows)
        manifests[hospital] = []
        for row in rows:
            place = "server" if row["patient_id"] in server else hospital
            masked = {"patient_id": row["patient_id"], "image": found(root / row["image"])}
            manifests[place].append(masked | {"mask": found(root / row["mask"]), "site": hospital})
    return manifests


def read_metadata(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The records of a metadata.csv.

    Raises:
        BadData: there is no such file, or a column is missing.
    """
    if not path.is_file():
        raise BadData(f"{path}: no such file; DATA must be the folder that holds cxr/dev and seg2d/dev")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("patient_id", *columns) if name not in (reader.fieldnames or ())]
        if missing:
            raise BadData(f'{path}: no column "{missing[0]}"')
        return list(reader)


def of_hospital(records: Sequence[dict[str, str]], hospital: str) -> list[dict[str, str]]:
    """The records of one hospital.

    Raises:
        BadData: there are none.
    """
    rows = [record for record in records if record["hospital"] == hospital]
    if not rows:
        raise BadData(f"the metadata names no image of the hospital {hospital}")
    return rows


def split_patients(rows: Iterable[Record]) -> tuple[set[str], list[str]]:
    """A quarter of the patients (at least one) for the server, and the rest, both in the order of their hashes."""
    patients = sorted({row["patient_id"] for row in rows}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = max(1, round(SERVER_SHARE * len(patients)))
    return set(patients[:count]), patients[count:]


def manifest_row(record: Record, root: Path, labels: Record) -> dict[str, str]:
    """One image of the classification; `image` is a path from here until `write`."""
    image = found(root / record["path"])
    return {"patient_id": record["patient_id"], "image": image, **{key: record[key] for key in ABOUT}, **labels}


def found(path: Path) -> str:
    """The path of a file that exists.

    Raises:
        BadData: it does not.
    """
    if not path.is_file():
        raise BadData(f"{path}: no such file, but the metadata names it")
    return str(path)


def binary(text: str) -> str:
    """A label as 0, 1 or nothing, from "1.0", "0" or ""."""
    return str(int(float(text))) if text else ""


def write(folder: Path, manifests: Mapping[str, Sequence[Record]]) -> None:
    """Write `<folder>/<site>/manifest.csv` for every site, with paths relative to the manifest."""
    for site, rows in manifests.items():
        (folder / site).mkdir(parents=True, exist_ok=True)
        with (folder / site / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys() if rows else ("patient_id", "image"))
            writer.writeheader()
            for row in rows:
                paths = {key: os.path.relpath(row[key], folder / site) for key in ("image", "mask") if key in row}
                writer.writerow({**row, **paths})


if __name__ == "__main__":
    sys.exit(main())
