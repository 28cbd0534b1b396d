"""Which patients a task touches, as the ledger's cohort: from the manifest's ids and the decoded pictures.

Decoding every picture for its fingerprint takes as long as filling the cache of images, so what was found is kept under
the site's records, as keyed digests, and found again for as long as no file changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.config import TaskConfig
from fedmed.durable import make_private, write_atomically
from fedmed.errors import DataError, LedgerUnusable, UnreadableImage, plain_reason
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.decoding import VOLUME_BYTES, VOLUME_TIMEOUT_S
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.manifest import Row, read_manifest
from fedmed.privacy.cohort import Cohort, cohort_of
from fedmed.training.oversight import Permit

KEPT = 8  # cohorts on disk


def cohort_of_patients(
    patients: Iterable[str], manifest: Path | None, task: TaskConfig, permit: Permit, *, idle: Iterable[str] = ()
) -> Cohort:
    """The cohort of some of a site's patients.

    Args:
        patients: their ids.
        idle: of more patients, no image of whom this run can read. They are charged as well, so that nothing that is
            said of the charges tells who they are; but not if they have no picture by which to know them again.
        manifest: the site's CSV; None for data that are no images, whose patients are known by id at best.
        task: which columns the manifest has.
        permit: of the task that touches them.

    Raises:
        DataError: the manifest cannot be read.
        LedgerUnusable: what was found cannot be kept.
    """
    stable = permit.ledger.policy.privacy.stable_ids
    touched = set(patients)
    if manifest is None:
        return cohort_of({patient: [] for patient in touched}, permit.keys, stable_ids=stable)
    chosen = {*touched, *idle}
    try:
        rows = [row for row in read_manifest(manifest, task, lenient=True).rows if row.patient in chosen]
    except DataError as error:  # it was changed since it was loaded; a server is not told how
        raise DataError(str(error)) from None
    kept = permit.oversight.folder / "cohorts" / f"{_state_of(rows, permit, stable=stable)}.bin"
    members = b""
    with suppress(OSError):
        members = kept.read_bytes()
        os.utime(kept)
    if members and _holds(cohort := Cohort.of_members(members), touched, permit):
        return cohort
    pictures: dict[str, list[bytes]] = {patient: [] for patient in sorted(chosen)}
    with DecodingProcess(timeout_s=VOLUME_TIMEOUT_S, memory_bytes=VOLUME_BYTES) as process:
        for row in rows:
            for image in row.images:
                with suppress(UnreadableImage):  # such a row is trained on by nobody
                    found = process.run("fingerprints", path=str(image))["fingerprints"]
                    pictures[row.patient] += [bytes(fingerprint) for fingerprint in found]
    known = {patient: found for patient, found in pictures.items() if found or patient in touched}
    cohort = cohort_of(known, permit.keys, stable_ids=stable)
    _keep(kept, cohort)
    return cohort


def patients_of(data: Dataset, rows: NDArray[np.int64]) -> set[str]:
    """The ids of the patients of some rows of a data set."""
    return {data.patients[row] for row in rows}


def _holds(cohort: Cohort, patients: Iterable[str], permit: Permit) -> bool:
    """Whether all of these patients are in a cohort."""
    digests = {bytes(digest) for digest in cohort.digests}
    return all(permit.keys.link("patient", patient.encode()) in digests for patient in patients)


def _state_of(rows: Iterable[Row], permit: Permit, *, stable: bool) -> str:
    """A digest of who the rows are of and of the state of their files, under the site's key."""
    facts = [[row.patient, str(image), *_times(image)] for row in rows for image in row.images]
    text = json.dumps([stable, facts]).encode()
    return permit.keys.link("cohort", hashlib.sha256(text).digest()).hex()


def _times(path: Path) -> list[int]:
    """Size and times of a file, or of all in a folder; the time of change is set by the system."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [number for file in files for number in _facts(file.stat())]
    except OSError:
        return []


def _facts(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _keep(path: Path, cohort: Cohort) -> None:
    """Keep a cohort's digests; those used longest ago make room."""
    try:
        make_private(path.parent)
        write_atomically(path, cohort.members, mode=0o600, shared=True)
        for old in sorted(path.parent.glob("*.bin"), key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        text = f"the site's cohorts cannot be kept ({plain_reason(error)})"
        raise LedgerUnusable(text, rule="cohorts.unwritable") from None
