"""Finished runs are found again by what they would train: configuration, content of the data files, fedmed's code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.durable import sha256_of
from fedmed.experiments.arms import Trial
from fedmed.federated.identity import package_hash

DONE = ("completed", "degraded")


def digest(config: RunConfig) -> str:
    """What two runs have in common if one can stand for the other.

    The name of a run and its number of worker processes change no weight; the content of a manifest, a file of weights
    and a policy does, wherever it lies open. Images are trusted to be those that they were.
    """
    values = run_file.nested(config)
    del values["name"], values["simulation"]["workers"]
    paths = [*config.data.sites, config.data.server, config.model.weights, config.simulation.policy]
    files = {path: sha256_of(Path(path)) for path in paths if path and Path(path).is_file()}
    facts = json.dumps([package_hash(), values, files], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def folder_of(trial: Trial, runs: Path) -> Path:
    """Where a trial's run is, or is to be: whatever an earlier experiment called it."""
    mark = digest(trial.config)
    found = sorted(runs.glob(f"*-{mark}"))
    return found[0] if found else runs / f"{trial.label}-{mark}"


def result_of(folder: Path) -> dict[str, Any] | None:
    """The content of a run's `result.json`, if it ended with a network; None else, as after a kill."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = result.get("status") in DONE and (folder / "model.safetensors").exists()
    return result if whole else None
