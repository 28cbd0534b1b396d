"""From the manifests of a run to its virtual hospitals: as they are given, or with their patients dealt anew."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.config import RunConfig
from fedmed.durable import sync_folder, write_atomically
from fedmed.errors import ConfigError, DataError, UnreadableImage
from fedmed.federated import partition
from fedmed.federated.member import NAME
from fedmed.federated.sites import site_names
from fedmed.imaging.manifest import cell_of, images_of, listed, read_manifest, read_records
from fedmed.imaging.scanners import scanner_digest
from fedmed.training.run_data import custom_dataset
from fedmed.types import OnProgress

ORDER = ".order"  # the hospitals' names by line, in partition/; no hospital's name begins with a dot
UNKNOWN = "unreadable"  # the scanner of images whose header cannot be read
Record = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """A virtual hospital before the run."""

    name: str
    patients: int
    images: int
    positives: tuple[int, ...] = ()  # images, by label of the task; none for masks
    header: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()  # with absolute paths; none where the hospital's manifest is as it was given


def planned(config: RunConfig, progress: OnProgress | None = None) -> tuple[Hospital, ...]:
    """The hospitals that a run will have. Nothing is written.

    Raises:
        DataError: a manifest cannot be used, the column that decides is missing, empty or torn within a patient, or
            patients to be dealt are the server's too.
        ConfigError: there are too few patients, or too few labels for the scheme.
    """
    return _as_given(config) if config.simulation.partition == "as-given" else _dealt(config, progress)


def check_files(config: RunConfig) -> list[str]:
    """Look whether what the manifests name is there; nothing is opened.

    Returns:
        A line for every manifest of which files are missing, and few enough for the run to go on without them.

    Raises:
        DataError: so many are missing that the run would go on without the site.
    """
    if config.data.dataset:
        return []
    warnings = []
    for reference in filter(None, [*config.data.sites, config.data.server]):
        rows = read_manifest(Path(reference), config.task).rows
        absent = [row.number for row in rows if not all(path.exists() for path in (*row.images, row.mask) if path)]
        if not absent:
            continue
        told = f"{reference}: {len(absent)} of {len(rows)} images or masks are not there ({listed(absent)})"
        if len(absent) > config.data.max_unreadable * len(rows):
            raise DataError(f"{told}; paths in a manifest are relative to it")
        warnings.append(told)
    return warnings


def with_hospitals(config: RunConfig, folder: Path, hospitals: Sequence[Hospital] | None = None) -> RunConfig:
    """Return `config` with the manifests of its virtual hospitals, writing them to `folder`/partition if need be.

    The manifests name absolute paths and patients. They are this machine's own, like the images, and are never sent.
    A run that is resumed keeps its hospitals, whatever has happened to the manifests that they were dealt from.

    Args:
        config: the run.
        folder: of the run.
        hospitals: what `planned` gave, if it was asked already.

    Raises:
        FedmedError: as `planned`.
    """
    if config.simulation.partition == "as-given":
        return config
    home = (folder / "partition").absolute()
    if "," in str(home):
        raise ConfigError("--out: with a partition the run folder's path must not hold a comma")
    if not home.exists():
        _write(planned(config) if hospitals is None else hospitals, home)
    names = (home / ORDER).read_text(encoding="utf-8").splitlines()
    data = config.data.model_copy(update={"sites": tuple(str(home / name / "manifest.csv") for name in names)})
    simulation = config.simulation.model_copy(update={"partition": "as-given"})
    return config.model_copy(update={"data": data, "simulation": simulation})


def _as_given(config: RunConfig) -> tuple[Hospital, ...]:
    hospitals = []
    for name, reference in zip(site_names(config), config.data.sites, strict=True):
        if config.data.dataset:
            data = custom_dataset(config.data.dataset)(Path(reference), config)
            hospitals.append(Hospital(name=name, patients=len(set(data.patients)), images=len(data)))
            continue
        rows = read_manifest(Path(reference), config.task).rows
        labels = range(len(config.task.labels) if config.task.kind == "classification" else 0)
        positives = tuple(sum(row.labels[label] == 1 for row in rows) for label in labels)
        patients = len({row.patient for row in rows})
        hospitals.append(Hospital(name=name, patients=patients, images=len(rows), positives=positives))
    return tuple(hospitals)


def _dealt(config: RunConfig, progress: OnProgress | None) -> tuple[Hospital, ...]:
    header, of_patient = _joined(config)
    labels = config.task.labels if config.task.kind == "classification" else ()
    hospitals = []
    for name, patients in _deal(config, of_patient, progress).items():
        records = tuple(record for patient in patients for record in of_patient[patient])
        positives = tuple(sum(_positive(record[label]) for record in records) for label in labels)
        hospitals.append(
            Hospital(
                name=name,
                patients=len(patients),
                images=len(records),
                positives=positives,
                header=header,
                records=records,
            )
        )
    return tuple(hospitals)


def _deal(config: RunConfig, of_patient: Mapping[str, list[Record]], progress: OnProgress | None) -> partition.Dealt:
    given, seed, patients = config.simulation, config.seed, list(of_patient)
    if given.partition == "iid":
        return partition.iid(patients, sites=given.partition_sites, seed=seed)
    if given.partition == "quantity":
        return partition.quantity(patients, sites=given.partition_sites, alpha=given.partition_alpha, seed=seed)
    if given.partition == "dirichlet":
        if config.task.kind != "classification":
            raise ConfigError('simulation.partition = "dirichlet" needs labels, and masks have none; try "quantity"')
        positive = {
            patient: [label for label in config.task.labels if any(_positive(record[label]) for record in records)]
            for patient, records in of_patient.items()
        }
        classes = partition.class_of(positive)
        return partition.dirichlet(classes, sites=given.partition_sites, alpha=given.partition_alpha, seed=seed)
    if given.partition == "scanner":
        return partition.numbered(partition.by_value(_scanners(of_patient, progress)), "scanner")
    return _by_column(of_patient, given.partition_column)


def _by_column(of_patient: Mapping[str, list[Record]], column: str) -> partition.Dealt:
    values = {patient: [record.get(column, "") for record in records] for patient, records in of_patient.items()}
    bad = {value for its in values.values() for value in its if not NAME.fullmatch(value)}
    if bad:
        reason = "empty or missing" if bad == {""} else "none that a site can have (letters, digits, space, _ . -)"
        raise DataError(f'simulation.partition-column = "{column}": the name of some rows is {reason}')
    torn = sum(len(set(its)) > 1 for its in values.values())
    if torn:
        raise DataError(
            f'simulation.partition-column = "{column}": {torn} patients have images at more than one site, so '
            "hospitals would share patients; mend the manifest"
        )
    return partition.by_value(values)


def _scanners(of_patient: Mapping[str, list[Record]], progress: OnProgress | None) -> dict[str, list[str]]:
    total, done = sum(map(len, of_patient.values())), 0
    found: dict[str, list[str]] = defaultdict(list)
    for patient, records in of_patient.items():
        for record in records:
            try:
                first = next(image for image in images_of(record["image"], Path()) if image is not None)
                found[patient].append(scanner_digest(first))
            except UnreadableImage:
                found[patient].append(UNKNOWN)
            done += 1
            if progress is not None:
                progress(done, total)
    return found


def _joined(config: RunConfig) -> tuple[tuple[str, ...], dict[str, list[Record]]]:
    """All columns, and every patient's rows from all manifests, with absolute paths; one patient_id is one patient."""
    header: dict[str, None] = {}
    of_patient: dict[str, list[Record]] = defaultdict(list)
    for reference in config.data.sites:
        path = Path(reference)
        read_manifest(path, config.task)  # which says what is wrong with it
        columns, records = read_records(path)
        header |= dict.fromkeys(columns)
        for record in records:
            files = {"image": cell_of(images_of(record["image"], path.parent.absolute()))}
            if record.get("mask"):
                files["mask"] = str((path.parent / record["mask"]).absolute())
            of_patient[record["patient_id"]].append({**record, **files})
    if config.data.server:
        judged = {row.patient for row in read_manifest(Path(config.data.server), config.task).rows}
        if shared := len(judged & of_patient.keys()):
            raise DataError(
                f"data.server: {shared} of its patients are in data.sites too, by their patient_id; dealt to hospitals "
                "(simulation.partition) they would be trained on and judged. Take them out of either"
            )
    return tuple(header), dict(of_patient)


def _positive(text: str) -> bool:
    return bool(text) and float(text) == 1


def _write(hospitals: Sequence[Hospital], home: Path) -> None:
    """Write all manifests; the folder appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=".partition-", dir=home.parent))  # its owner's alone: it names patients
    try:
        for hospital in hospitals:
            text = io.StringIO()
            writer = csv.DictWriter(text, hospital.header, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(hospital.records)
            (partial / hospital.name).mkdir()
            write_atomically(partial / hospital.name / "manifest.csv", text.getvalue().encode(), mode=0o600)
        write_atomically(partial / ORDER, "".join(f"{hospital.name}\n" for hospital in hospitals).encode())
        os.replace(partial, home)  # noqa: PTH105  # one name for every rename, which the kill tests count
        sync_folder(home.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
