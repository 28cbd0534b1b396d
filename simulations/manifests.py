"""What the simulations on real data share: reading a table of images, dealing patients, writing manifests.

Python alone is needed. A folder's `prepare.py` says which images are whose; nothing is copied and nothing downloaded.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

Record = Mapping[str, str]
Manifests = Mapping[str, Sequence[Record]]  # "site-1", "fold-2/server", … to the rows of its manifest.csv
MODALITIES = ";"  # between the files of one row


class BadData(Exception):
    """What is missing, in one line."""


def command(
    folder: Path,
    manifests_of: Callable[[Path], Manifests],
    arguments: Sequence[str] | None,
    *,
    expected: str,
    run_files: Sequence[str] = ("run.toml",),
) -> int:
    """The command line of a `prepare.py`; returns the exit status.

    Args:
        folder: where its run file lies.
        manifests_of: the rows of every manifest, out of the folder that DATA names.
        arguments: of the command line; None = the process's own.
        expected: what DATA has to hold, for `--help`.
        run_files: where below OUT its `run.toml` is copied.
    """
    parser = argparse.ArgumentParser(
        description="Write the manifests and run files of this simulation. No image is copied.",
        epilog=f"example: python simulations/{folder.name}/prepare.py path/to/data out",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help=f"the folder that holds {expected}")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; existing manifests are replaced")
    options = parser.parse_args(arguments)
    try:
        manifests = manifests_of(options.data)
        write(options.out, manifests)
        for place in run_files:
            shutil.copyfile(folder / "run.toml", options.out / place)
    except (BadData, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for site, rows in manifests.items():
        print(f"{site}: {len({row['patient_id'] for row in rows})} patients, {len(rows)} images")
    return 0


def read_metadata(path: Path, task: str, columns: Iterable[str]) -> list[dict[str, str]]:
    """The records of a metadata.csv, of one `task` if it is named.

    Raises:
        BadData: there is no such file, a column is missing, or there is no record.
    """
    if not path.is_file():
        raise BadData(f"{path}: no such file")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("patient_id", *columns) if name not in (reader.fieldnames or ())]
        if missing:
            raise BadData(f'{path}: no column "{missing[0]}"')
        records = [record for record in reader if not task or record["task"] == task]
    if not records:
        raise BadData(f"{path}: no image{f' of {task}' if task else ''}")
    return records


def patients_of(records: Iterable[Record]) -> list[str]:
    """Every patient once, in the order of the hashes of their ids."""
    return sorted({row["patient_id"] for row in records}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def dealt(records: Iterable[Record], hands: int) -> list[list[Record]]:
    """Records in as many parts, patients dealt in the order of their hashes, so that all of one are in one part."""
    records = list(records)
    hand_of = {patient: place % hands for place, patient in enumerate(patients_of(records))}
    return [[row for row in records if hand_of[row["patient_id"]] == hand] for hand in range(hands)]


def found(path: Path) -> str:
    """The path of a file that exists.

    Raises:
        BadData: it does not.
    """
    if not path.is_file():
        raise BadData(f"{path}: no such file, but the metadata names it")
    return str(path)


def write(folder: Path, manifests: Manifests) -> None:
    """Write `<folder>/<site>/manifest.csv` for every site, with paths relative to the manifest."""
    for site, rows in manifests.items():
        (folder / site).mkdir(parents=True, exist_ok=True)
        with (folder / site / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys() if rows else ("patient_id", "image"))
            writer.writeheader()
            for row in rows:
                paths = {key: _relative(row[key], folder / site) for key in ("image", "mask") if key in row}
                writer.writerow({**row, **paths})


def _relative(files: str, folder: Path) -> str:
    return MODALITIES.join(os.path.relpath(file, folder) if file else "" for file in files.split(MODALITIES))
