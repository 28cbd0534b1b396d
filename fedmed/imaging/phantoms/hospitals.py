"""Phantom hospitals: each has its own X-ray unit, which writes the same physics in its own DICOM dialect.

`synthesize` writes manifests, DICOM files and masks. Two hospitals differ in polarity, bit depth, sign, rescale,
window or VOI LUT, matrix, pixel spacing, transfer syntax, contrast, noise, and how frequent each finding is. Objects
are valid Computed Radiography or Digital X-Ray (for presentation) images (DICOM PS3.3 A.2, A.26).
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmed.errors import ConfigError
from fedmed.imaging.phantoms.chest import Thorax, chest
from fedmed.imaging.phantoms.dicom_object import Patient, write_object
from fedmed.imaging.phantoms.findings import FINDINGS
from fedmed.imaging.phantoms.scanner import SCANNERS, Scanner
from fedmed.types import OnProgress

LABELS = tuple(FINDINGS)


@dataclass(frozen=True, kw_only=True)
class PhantomHospital:
    """One folder to be written."""

    name: str
    number: int  # 0 = the server
    scanners: tuple[Scanner, ...]  # patients take them in turn


def synthesize(
    out: Path,
    *,
    task: Literal["cxr", "lung-seg"],
    sites: int = 4,
    patients: int,
    seed: int,
    progress: OnProgress | None = None,
) -> None:
    """Write `out/site-1` … and `out/server`, each with a manifest.csv, images/ and, for "lung-seg", masks/.

    Args:
        out: a folder, made if need be.
        task: "cxr" has a 0/1 column for each of `LABELS`; "lung-seg" a mask of the lung fields, 0 or 255.
        sites: hospitals; each has one scanner, the fifth a new one, the seventh the first one's.
        patients: of each hospital, and of the server, whose patients are drawn over all scanners in turn.
        seed: the same seed gives the same files.
        progress: called with images done and about how many there will be.

    Raises:
        ConfigError: a count is impossible or the task unknown.
    """
    if sites < 1 or patients < 1 or seed < 0:
        raise ConfigError(f"sites = {sites}, patients = {patients}, seed = {seed}: at least 1, 1 and 0 are needed")
    if task not in ("cxr", "lung-seg"):
        raise ConfigError(f'task = "{task}" is unknown; there are cxr, lung-seg')
    units = tuple(SCANNERS[index % len(SCANNERS)] for index in range(sites))
    hospitals = [PhantomHospital(name=f"site-{i + 1}", number=i + 1, scanners=(unit,)) for i, unit in enumerate(units)]
    hospitals.append(PhantomHospital(name="server", number=0, scanners=units))
    done, total = 0, round(2.5 * patients * len(hospitals))
    with _mapping(patients * len(hospitals)) as over_patients:
        for hospital in hospitals:
            for images in _write_hospital(out / hospital.name, hospital, task, patients, seed, over_patients):
                done += images
                if progress is not None:
                    progress(done, max(done, total))
    if progress is not None:
        progress(done, done)


@contextmanager
def _mapping(patients: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, here or over processes if there are patients enough to pay for their start."""
    processes = min(os.cpu_count() or 1, patients // 100)
    if processes < 2:
        yield map
        return
    # Spawned, not forked: whoever calls may have threads, and a forked copy of their locks could wait forever
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=4)


def patient_labels(hospital: PhantomHospital, patients: int, seed: int) -> NDArray[np.bool_]:
    """Which patient has which finding, (patients, labels): a fixed share, from .35 to .55, in random order.

    A hospital with several scanners has the same share throughout, so that no scanner tells of a finding.
    """
    rng = np.random.default_rng([seed, hospital.number, 2**32 - 1])
    single = len(hospital.scanners) == 1
    shares = rng.uniform(0.35, 0.55, len(LABELS)) if single else np.full(len(LABELS), 0.45)
    counts = np.clip(np.rint(shares * patients), min(1, patients - 1), None)
    ranks = rng.permuted(np.tile(np.arange(patients), (len(LABELS), 1)), axis=1)
    return (ranks < counts[:, None]).T


def _write_hospital(
    folder: Path,
    hospital: PhantomHospital,
    task: str,
    patients: int,
    seed: int,
    over_patients: Callable[..., Iterator[Any]],
) -> Iterator[int]:
    """Yields the number of a patient's images after each patient."""
    segmentation = task == "lung-seg"
    for name in ("images", *(["masks"] if segmentation else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    columns = ["mask"] if segmentation else LABELS
    numbers, labels = range(patients), patient_labels(hospital, patients, seed)
    before = accumulate((_drawn(hospital, number, seed)[2] for number in numbers), initial=0)
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["patient_id", "image", *columns, "study_uid", "series_uid", "view", "age", "sex"])
        for rows in over_patients(partial(_write_patient, folder, hospital, task, seed), numbers, labels, before):
            table.writerows(rows)
            yield len(rows)


def _drawn(hospital: PhantomHospital, number: int, seed: int) -> tuple[np.random.Generator, Patient, int]:
    """A patient, how many exposures there are, and the generator that draws those."""
    rng = np.random.default_rng([seed, hospital.number, number])
    return rng, Patient.random(hospital.number, number, seed, rng), int(rng.integers(2, 4))


def _write_patient(
    folder: Path, hospital: PhantomHospital, task: str, seed: int, number: int, labels: NDArray[np.bool_], before: int
) -> list[list[object]]:
    """Write a patient's images, numbered after the `before` of others. Returns their rows of the manifest."""
    rng, patient, exposures = _drawn(hospital, number, seed)
    scanner = hospital.scanners[number % len(hospital.scanners)]
    rows: list[list[object]] = []
    for exposure in range(exposures):
        image = f"images/{before + exposure + 1:04d}.dcm"
        body = radiograph(scanner, labels, rng)
        uids = write_object(folder / image, body.picture, scanner, patient, exposure)
        targets: list[object] = labels.astype(int).tolist()
        if task == "lung-seg":
            mask = f"masks/{before + exposure + 1:04d}.png"
            Image.fromarray(body.lungs.astype(np.uint8) * 255).save(folder / mask)
            targets = [mask]
        rows.append(
            [patient.identifier, image, *targets, uids.study, uids.series, patient.view, patient.age, patient.sex]
        )
    return rows


def radiograph(scanner: Scanner, labels: Sequence[bool] | NDArray[np.bool_], rng: np.random.Generator) -> Thorax:
    """A chest as this unit shows it: its matrix, contrast curve and noise."""
    present = {name: bool(value) for name, value in zip(LABELS, labels, strict=True)}
    body = chest(scanner.matrix, present, rng)
    noise = scanner.noise * rng.standard_normal(scanner.matrix, dtype=np.float32)
    picture = np.clip(body.picture**scanner.gamma + noise, 0, 1)
    return Thorax(picture=picture, lungs=body.lungs, cells=body.cells)
