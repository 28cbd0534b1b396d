"""The data of a run that names none: phantom hospitals, made once on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from fedmed.config import RunConfig, flatten, unflatten, validate
from fedmed.imaging.phantoms.hospitals import synthesize
from fedmed.types import OnProgress

Kind = Literal["cxr", "lung-seg"]
SITES, PATIENTS, SEED = 4, 80, 7
RUNS: dict[Kind, str] = {
    "cxr": """\
name = "phantom-cxr"
seed = 7

[model]
name = "chexnet"
norm = "batch"                 # learns fastest from scratch; "group" is for differential privacy

[task]
kind = "classification"
labels = ["nodule", "cavity", "reticulation", "consolidation"]

[train]
rounds = 8
batch-size = 16
learning-rate = 1e-3
precision = "auto"             # bfloat16 where the machine has units for it
channels-last = true           # faster on a CPU for this network
""",
    "lung-seg": """\
name = "phantom-lung-seg"
seed = 7

[model]
name = "unet"
width = 16

[task]
kind = "segmentation"
labels = ["lung"]

[train]
rounds = 4
local-epochs = 2
batch-size = 16
learning-rate = 1e-3
""",
}


def phantom_folder(kind: Kind) -> Path:
    """Where the built-in hospitals lie: `$FEDMED_PHANTOMS`, or `~/.fedmed/phantoms`."""
    root = Path(os.environ.get("FEDMED_PHANTOMS") or Path.home() / ".fedmed" / "phantoms")
    return root / f"{kind}-{SITES}x{PATIENTS}-seed{SEED}"


def with_phantoms(
    config: RunConfig, progress: OnProgress | None = None, *, explicit: Collection[str] = ()
) -> RunConfig:
    """Return `config` with the built-in phantom hospitals where it names no sites, making them if need be.

    A configuration that names neither sites nor labels is the demo: keys at their defaults take the demo's values, but
    for the `explicit` ones, which were given.
    """
    if config.data.sites:
        return config
    kind: Kind = "cxr" if config.task.kind == "classification" else "lung-seg"
    if not config.task.labels:
        config = _demo(config, kind, explicit)
    folder = phantom_folder(kind)
    if not folder.exists():
        make_phantoms(folder, kind, sites=SITES, patients=PATIENTS, seed=SEED, progress=progress)
    sites = tuple(str(folder / f"site-{number}" / "manifest.csv") for number in range(1, SITES + 1))
    server = config.data.server or str(folder / "server" / "manifest.csv")
    data = config.data.model_copy(update={"sites": sites, "server": server})
    return config.model_copy(update={"data": data})


def _demo(config: RunConfig, kind: Kind, explicit: Collection[str]) -> RunConfig:
    given, default, demo = (flatten(each) for each in (config, RunConfig(), validate(tomllib.loads(RUNS[kind]))))
    kept = {key for key, value in given.items() if value != default[key] or key in explicit}
    return unflatten({key: given[key] if key in kept else demo[key] for key in given})


def phantom_run(kind: Kind, sites: int) -> str:
    """A run file that trains on phantom hospitals in the same folder."""
    manifests = ", ".join(f'"site-{number}/manifest.csv"' for number in range(1, sites + 1))
    data = f'[data]\nsites = [{manifests}]\nserver = "server/manifest.csv"\n'
    least = "" if sites > 1 else "\n[strategy]\nmin-sites = 1\n"
    return RUNS[kind].replace("[train]", f"{data}\n[train]") + least


def make_phantoms(
    folder: Path,
    kind: Kind,
    *,
    sites: int,
    patients: int,
    seed: int,
    progress: OnProgress | None = None,
) -> None:
    """Write phantom hospitals to `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        synthesize(partial, task=kind, sites=sites, patients=patients, seed=seed, progress=progress)
        (partial / "run.toml").write_text(phantom_run(kind, sites), encoding="utf-8")
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same pixels
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
