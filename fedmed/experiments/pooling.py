"""All sites' data as one site's: what training on pooled data would have seen, with the same patients held out.

A patient is held out of the pooled training exactly where its own site holds it out. Patients are told apart by site:
the same identifier at two hospitals is two patients, as it is in a federation.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.config import RunConfig
from fedmed.durable import sha256_of, write_atomically
from fedmed.errors import DataError
from fedmed.federated.sites import site_names
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.manifest import cell_of, read_manifest
from fedmed.imaging.split import evaluation_rows
from fedmed.training.run_data import custom_dataset

SITE = "pooled"
SOURCES = "sources.json"  # in the folder that stands for pooled data of the user's own


def pooled_data(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Write what stands for the pooled data, and return the keys of `[data]` that name it.

    What is written lies in a folder named by its content, so that a later change of the data changes no earlier run.

    Raises:
        DataError: a manifest cannot be used.
    """
    if config.data.dataset:
        site = _sources(config, config.data.sites, folder)
        server = _sources(config, (config.data.server,), folder) if config.data.server else ""
        return {"dataset": f"{__name__}:pooled", "sites": [site], "server": server}
    content = _merged(config).encode()
    path = _place(folder, content) / SITE / "manifest.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return {"sites": [str(path)]}


def pooled(path: Path, config: RunConfig) -> Dataset:
    """The data set of several sites' own functions, one after the other (`data.dataset` of a pooled arm)."""
    sources = json.loads((path / SOURCES).read_text(encoding="utf-8"))
    function = custom_dataset(sources["dataset"])
    parts = [function(Path(reference), config) for reference in sources["sites"]]
    if len(parts) == 1:
        return parts[0]
    batches = [part.batch(np.arange(len(part))) for part in parts]
    shapes = {(images.shape[1:], targets.shape[1:]) for images, targets in batches}
    if len(shapes) > 1:
        raise DataError("the sites' data sets cannot be pooled: their images or targets differ in shape")
    targets = np.concatenate([targets.numpy() for _, targets in batches])
    return Dataset(
        images=np.concatenate([images.numpy() for images, _ in batches]),
        targets=targets if targets.ndim == 2 else targets.astype(np.uint8),
        patients=tuple(f"{number}/{patient}" for number, part in enumerate(parts) for patient in part.patients),
        evaluation=np.concatenate([part.evaluation for part in parts]),
    )


def _merged(config: RunConfig) -> str:
    """One manifest of all sites' rows, each with the side of the split that its own site puts it on."""
    text = io.StringIO()
    labels = config.task.labels if config.task.kind == "classification" else ()
    columns = ["patient_id", "image", *(["mask"] if config.task.kind == "segmentation" else labels), "split"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for name, path in zip(site_names(config), config.data.sites, strict=True):
        manifest = read_manifest(Path(path), config.task)
        held = evaluation_rows(manifest, config.evaluate.site_share, config.split_seed, name)
        for row, out in zip(manifest.rows, held, strict=True):
            known = ["" if math.isnan(value) else f"{value:g}" for value in row.labels]
            masks = [] if row.mask is None else [str(row.mask)]
            image = cell_of(row.modalities)
            writer.writerow([f"{name}/{row.patient}", image, *masks, *known, "test" if out else "train"])
    return text.getvalue()


def _sources(config: RunConfig, sites: tuple[str, ...], folder: Path) -> str:
    files = {path: sha256_of(Path(path)) for path in sites if Path(path).is_file()}
    content = json.dumps({"dataset": config.data.dataset, "sites": list(sites), "files": files}).encode()
    path = _place(folder, content) / (SITE if sites == config.data.sites else "server")
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / SOURCES, content)
    return str(path)


def _place(folder: Path, content: bytes) -> Path:
    return folder.absolute() / "pooled-data" / hashlib.sha256(content).hexdigest()[:12]
