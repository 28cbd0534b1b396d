"""What the simulations on chest X-rays share: whose images there are, what is known of each, and who is held out.

Python alone is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from manifests import BadData, Record, found, patients_of

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
COVID_HOSPITALS = ("hannover_mhh", "covid_italy", "covid_spain", "covid_australia", "covid_world")
ABOUT = ("view", "age", "sex")
SERVER_SHARE = 0.25  # of the patients


def of_hospital(records: Sequence[Record], hospital: str) -> list[Record]:
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
    patients = patients_of(rows)
    count = max(1, round(SERVER_SHARE * len(patients)))
    return set(patients[:count]), patients[count:]


def manifest_row(record: Record, root: Path, labels: Record) -> dict[str, str]:
    """One image of the classification; `image` is a path from here until `write`."""
    image = found(root / record["path"])
    return {"patient_id": record["patient_id"], "image": image, **{key: record[key] for key in ABOUT}, **labels}


def masked_row(record: Record, root: Path) -> dict[str, str]:
    """One image of the segmentation, with its mask; both are paths from here until `write`."""
    files = {"image": found(root / record["image"]), "mask": found(root / record["mask"])}
    return {"patient_id": record["patient_id"], **files}


def binary(text: str) -> str:
    """A label as 0, 1 or nothing, from "1.0", "0" or ""."""
    return str(int(float(text))) if text else ""
