"""Turn a folder of real chest X-rays into the hospitals of three comparisons.

`python prepare.py DATA OUT` writes, copying no image, `OUT/classification/`, `OUT/nih/` and `OUT/lungs/`, each with a
`run.toml` and a `<site>/manifest.csv` per hospital. It reads the same files as `simulations/real-cxr/prepare.py`, with
its functions. There is no server's set: every hospital's own held-out patients judge.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import tomli_w

HERE = Path(__file__).absolute().parent
NIH_SITES = ("nih-1", "nih-2", "nih-3", "nih-4")


def real_cxr() -> ModuleType:
    """The functions of `simulations/real-cxr/prepare.py`, which is in no package."""
    path = HERE.parent / "real-cxr" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare_real_cxr", path)
    if spec is None or spec.loader is None:
        raise OSError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all federations; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Write the manifests and run files of the comparisons. No image is copied.",
        epilog="example: python prepare.py path/to/data out && fedmed compare out/lungs/run.toml",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder that holds cxr/dev and seg2d/dev")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; existing manifests are replaced")
    options = parser.parse_args(arguments)
    source = real_cxr()
    try:
        write(options.data, options.out, source)
    except (source.BadData, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write(data: Path, out: Path, source: ModuleType) -> None:
    """Write a folder for each comparison.

    Raises:
        BadData: of `source`; what is missing, in one line.
    """
    every = classification(data, source)
    studies = (
        ("classification", "classification.toml", every),
        ("nih", "classification.toml", {site: every[site] for site in NIH_SITES}),
        ("lungs", "lungs.toml", lungs(data, source)),
    )
    for name, run_file, manifests in studies:
        source.write(out / name, manifests)
        values = tomllib.loads((HERE / run_file).read_text(encoding="utf-8"))
        values["data"]["sites"] = [f"{site}/manifest.csv" for site in manifests]
        (out / name / "run.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        for site, rows in manifests.items():
            print(f"{name}/{site}: {len({row['patient_id'] for row in rows})} patients, {len(rows)} images")


def classification(data: Path, source: ModuleType) -> dict[str, list[dict[str, str]]]:
    """NIH patients at four sites, in the order of their hashes, and the five COVID-19 collections."""
    root = data / "cxr"
    records = source.read_metadata(root / "dev" / "metadata.csv", ("hospital", "path", "Pneumonia_any", *source.ABOUT))
    nih = source.of_hospital(records, "nih_cc")
    first, rest = source.split_patients(nih)
    place = dict.fromkeys(first, 0) | {patient: 1 + number % 3 for number, patient in enumerate(rest)}
    rows = {site: [row for row in nih if place[row["patient_id"]] == number] for number, site in enumerate(NIH_SITES)}
    rows |= {hospital: source.of_hospital(records, hospital) for hospital in source.COVID_HOSPITALS}
    return {
        site: [source.manifest_row(row, root, {"Pneumonia": source.binary(row["Pneumonia_any"])}) for row in mine]
        for site, mine in rows.items()
    }


def lungs(data: Path, source: ModuleType) -> dict[str, list[dict[str, str]]]:
    """Every hospital of which the data hold lung masks."""
    root = data / "seg2d"
    records = source.read_metadata(root / "dev" / "metadata.csv", ("task", "hospital", "image", "mask"))
    masked = [record for record in records if record["task"] == "cxr_lungs"]
    return {
        hospital: [
            {
                "patient_id": row["patient_id"],
                "image": source.found(root / row["image"]),
                "mask": source.found(root / row["mask"]),
            }
            for row in source.of_hospital(masked, hospital)
        ]
        for hospital in sorted({record["hospital"] for record in masked})
    }


if __name__ == "__main__":
    sys.exit(main())
