"""The virtual hospitals of an experiment: patients dealt once, so that all of its runs have the same sites."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.durable import sha256_of
from fedmed.federated.virtual_hospitals import with_hospitals

FOLDER = "hospitals"


def dealt(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration with the manifests of its virtual hospitals as `data.sites`, writing them if need be.

    They are dealt with the run file's own seed, whatever seeds train on them, into a folder named by what decides them.
    So points of a sweep with the same partition share hospitals, and a changed manifest changes no earlier run.

    Args:
        config: the run, with every path absolute.
        folder: of the experiment. What is written there names patients and stays on this machine.

    Raises:
        DataError: a manifest cannot be used, a patient's rows disagree on the column that decides, or patients to be
            dealt are the server's too.
        ConfigError: there are too few patients or labels for the scheme, or a comma in the folder's path.
    """
    if config.simulation.partition == "as-given":
        return config
    values = run_file.nested(config)
    scheme = {key: value for key, value in values["simulation"].items() if key.startswith("partition")}
    references = [*config.data.sites, config.data.server]  # the server's decides whether they may be dealt at all
    contents = {
        path: sha256_of(Path(path)) for path in references if Path(path).is_file()
    }  # one missing is refused below
    facts = json.dumps([scheme, config.seed, values["task"], references, contents], sort_keys=True)
    home = folder.absolute() / FOLDER / hashlib.sha256(facts.encode()).hexdigest()[:12]
    home.mkdir(parents=True, exist_ok=True)
    return with_hospitals(config, home)
