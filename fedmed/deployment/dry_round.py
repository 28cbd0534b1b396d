"""A round on ten patients with a small network, in a process that is confined as a task is. It writes to no record.

`fedmed site check` starts it. It prints one JSON line: what it found of the device, of the limits and of the round.
"""

from __future__ import annotations

import csv
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.deployment.scratch import in_use
from fedmed.deployment.site_folder import SiteFolder, read_site_folder
from fedmed.deployment.task import confine_task, refusal
from fedmed.errors import ConfigError, DataError, FedmedError
from fedmed.federated.site_config import withdrawn_of
from fedmed.imaging.items import is_nifti
from fedmed.imaging.manifest import ABOUT, cell_of, images_of, read_columns
from fedmed.imaging.reading import PRESETS, read_image
from fedmed.training.network import resident_network
from fedmed.training.site import Site, settings_for_sites, site_data
from fedmed.training.site_round import train_round
from fedmed.types import Task

PATIENTS = 10
MOST_UNREADABLE = 0.5  # of ten patients' images, above which something is wrong with all; data.max-unreadable is of all


def dry_round(site: SiteFolder) -> str:
    """Train one round on the site's first ten patients who have not withdrawn, and say what it took.

    Raises:
        FedmedError: it cannot be done with these data on this device.
    """
    rows, header = _first_rows(site.root / site.config.manifest, withdrawn_of(site.file))
    with in_use(site) as place, tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder) / "manifest.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *([row[name] for name in header] for row in rows)])
        return _trained(site, path, _run(rows, header))


def preset_for(images: Sequence[Path]) -> str:
    """A preset that reads the first of these that any reads. Which one a run takes is the run's to say."""
    for image in images:
        if _is_volume(image):
            return "mr"  # any values
        for name in PRESETS:
            with suppress(FedmedError):
                read_image(image, preset=name)
                return name
    return next(iter(PRESETS))  # the round says what is wrong


def _trained(site: SiteFolder, manifest: Path, config: RunConfig) -> str:
    here = Site(name=site.config.name, manifest=manifest, device=site.config.device)
    network = resident_network(config, here.device)
    task = Task(
        kind="train",
        round=1,
        settings=settings_for_sites(config),
        layout=network.layout.hash,
        weights=network.weights(),
    )
    started = time.perf_counter()
    update = train_round(task, here)
    seconds = time.perf_counter() - started
    own, children = (
        resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    what = f"{update.facts['patients']} patients, {update.num_examples} images as {config.data.preset}"
    data = site_data(here, task.settings)  # as the round read them
    reasons = ", ".join(f"{reason}: {count}" for reason, count in data.reasons.items())
    left_out = f"; left out, as they cannot be read: {reasons} (fedmed data check names the rows)" if reasons else ""
    return f"{what}, {seconds:.1f} s on {here.device}; {own:.1f} GiB of memory, {children:.1f} GiB to decode{left_out}"


def _run(rows: Sequence[dict[str, str]], header: list[str]) -> RunConfig:
    """The smallest run that fits a manifest's columns."""
    row = rows[0]
    labels = [name for name in header if name not in ABOUT and row[name] in ("", "0", "1")][:1]
    segmentation = not labels and "mask" in header
    if not labels and not segmentation:
        raise DataError("the manifest has neither a mask nor a column of 0 and 1 to learn")
    modalities = images_of(row["image"], Path())
    images = [image for each in rows for image in images_of(each["image"], Path()) if image is not None]
    volume, preset = any(map(_is_volume, images[:1])), preset_for(images)
    values = {
        "name": "dry-round",
        "model": {
            "name": "unet" if segmentation else "small-cnn",
            "width": 4 if segmentation else 0,
            "in-channels": len(modalities) * (1 if volume else PRESETS[preset].channels),
        },
        "task": {"kind": "segmentation" if segmentation else "classification", "labels": labels or ["mask"]},
        "data": {"preset": preset, "items": "slices" if volume else "images", "max-unreadable": MOST_UNREADABLE},
        "train": {"rounds": 1, "batch-size": 4},
        "evaluate": {"site-share": 0.0},
    }
    return run_file.validate(values)


def _is_volume(image: Path) -> bool:
    return image.is_dir() or is_nifti(image)


def _first_rows(path: Path, withdrawn: frozenset[str]) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the first ten patients who have not withdrawn, with absolute paths."""
    patients: set[str] = set()
    rows = []
    _, columns = read_columns(path)
    for cells in zip(*columns.values(), strict=True):
        row = dict(zip(columns, cells, strict=True))
        if row["patient_id"] in withdrawn:
            continue
        patients.add(row["patient_id"])
        if len(patients) > PATIENTS:
            break
        row["image"] = cell_of(images_of(row["image"], path.parent))
        if row.get("mask"):
            row["mask"] = str(path.parent / row["mask"])
        rows.append(row)
    if not rows:
        raise DataError("the manifest has no rows of patients who have not withdrawn")
    return rows, list(rows[0])


def device(name: str) -> str:
    """Whether the device that site.toml names is there, and how much of it is free.

    Raises:
        ConfigError: it is not.
    """
    if name == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'' if threads == 1 else 's'}"
    try:
        free, size = torch.cuda.mem_get_info(name)
    except (RuntimeError, AssertionError, ValueError):
        raise ConfigError(
            f'device = "{name}": torch sees no such GPU; look at the driver (nvidia-smi), or write device = "cpu"'
        ) from None
    return f"{name}, {torch.cuda.get_device_name(name)}, {free / 2**30:.0f} of {size / 2**30:.0f} GiB free"


def findings(site: SiteFolder) -> Iterator[tuple[str, bool, str]]:
    """(what, whether it is well, what was found), in the confines of a task."""
    held = confine_task(site, records=False)
    refused = refusal(site, held)
    lax = "" if refused or not held.gaps else "; require-confinement = true in site.toml refuses tasks here"
    yield "limits of a task", not refused, f"{held}{lax}" if not refused else f"{refused}; {held}"
    looks: dict[str, Any] = {"device": lambda: device(site.config.device)}
    if not site.config.dataset:
        looks["dry round"] = lambda: dry_round(site)
    for what, look in looks.items():
        try:
            yield what, True, look()
        except FedmedError as error:
            yield what, False, str(error)
        except (MemoryError, RuntimeError, OSError) as error:
            yield what, False, f"ended by {type(error).__name__}; more memory (task-memory-gib), or another device"


if __name__ == "__main__":
    print(json.dumps(list(findings(read_site_folder(Path(sys.argv[1]))))))
