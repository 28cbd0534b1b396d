"""A network that a hospital trains alone, beside the federated one: what its own patients gained by taking part.

A hospital's tasks keep the network that the run began with and the one that it ended with. From the first one the site
trains its own, with the settings of the run, for as many rounds and in the same order of images; then both are judged
at the patients whom it holds out. Nothing of it leaves, so it is trained without noise.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fedmed.config import RunConfig
from fedmed.durable import write_json
from fedmed.errors import DataError
from fedmed.imaging.dataset import Dataset
from fedmed.metrics import (
    MINIMUM,
    Measures,
    classification_measures,
    interval_ends,
    join_cases,
    paired_difference,
    replicate,
    segmentation_measures,
)
from fedmed.training.evaluate import predictions, scored_cases
from fedmed.training.loop import RoundContext
from fedmed.training.network import FlatNetwork, resident_network
from fedmed.training.own_patients import OwnPatients
from fedmed.training.sampling import Rows
from fedmed.training.site import Site, settings_from, site_data
from fedmed.training.site_state import SiteState, write_durably
from fedmed.types import OnProgress, Task, Weights

FOLDER = "baseline"  # of the site's state folder
RESULT = "comparison.json"

Which = Literal["first", "final"]


@dataclass(frozen=True, kw_only=True)
class KeptNetwork:
    """A network of a run, as a task brought it."""

    weights: Weights
    settings: str
    run: str  # Task.run


def keep_network(state_dir: Path, which: Which, task: Task, weights: Weights) -> None:
    """Keep the network that a run begins or ends with. What was found of an earlier one no longer holds.

    Raises:
        DataError: the disk is full or read-only.
    """
    folder = state_dir / FOLDER
    vectors = {"parameters": weights.parameters, "buffers": weights.buffers}
    (state_dir / RESULT).unlink(missing_ok=True)
    if which == "first":
        for other in set(folder.glob("*/")) - {_rounds_of(state_dir, task.run)}:
            shutil.rmtree(other, ignore_errors=True)
    write_durably(folder / f"{which}.safetensors", vectors, {"settings": task.settings, "run": task.run})


def train_baseline(site: Site, watch: OnProgress) -> Path:
    """Train the site's own network, judge both, and write `comparison.json`; a second call goes on after a kill.

    Args:
        site: the hospital.
        watch: told (round, rounds) after every round.

    Raises:
        DataError: the site did not take part from the first round to the last, holds nobody out, or cannot write.
    """
    state_dir = site.state_dir
    if state_dir is None:
        raise DataError("the site keeps nothing of its runs (state-dir in site.toml)")
    first, final = _kept(state_dir, "first"), _kept(state_dir, "final")
    if first.run != final.run:
        raise DataError("this site was not in the first round of the run that ended last, or another run has begun")
    config, data = settings_from(final.settings), site_data(site, final.settings)
    rows = np.flatnonzero(data.evaluation)
    if len(rows) == 0:
        raise DataError("the site holds nobody out (evaluate.site-share = 0), so there are no patients to judge by")
    torch.set_num_threads(config.train.threads)
    network = resident_network(config, site.device)
    own = OwnPatients(network=network, data=data, config=config, site=site.name)
    state = SiteState(folder=_rounds_of(state_dir, final.run))
    network.load_(Weights(**state.before()) if state.last_round else first.weights)
    for round in range(state.last_round + 1, config.train.rounds + 1):
        own.train_(config.train, RoundContext(round=round))
        trained = network.weights()
        state.keep(round, {"parameters": trained.parameters, "buffers": trained.buffers}, reach=1)
        watch(round, config.train.rounds)
    if _kept(state_dir, "final").run != final.run:
        raise DataError("another run has ended meanwhile; give the command again to compare with that one")
    networks = {"local": network.weights(), "federated": final.weights}
    result = {"schema": 1, "name": config.name, "site": site.name, "primary": config.primary, "seeds": [config.seed]}
    result |= {"images": len(set(data.rows[rows].tolist())), "arms": _judged(networks, network, data, rows, config)}
    write_json(state_dir / RESULT, result, mode=0o600)
    return state_dir / RESULT


def _judged(
    networks: dict[str, Weights], network: FlatNetwork, data: Dataset, rows: Rows, config: RunConfig
) -> list[dict[str, Any]]:
    """Each network's primary metric, and how much more it is than that of the site's own: rows of `comparison.json`."""
    values, drawn, patients, enough = {}, {}, 0, False
    for name, weights in networks.items():
        network.load_(weights)
        measures, ids = _measures(network, data, rows, config)
        place, patients = measures.names.index(config.primary), len(set(ids))
        enough = bool(min(patients, measures.fewest(ids)[place]) >= MINIMUM)
        rng = np.random.default_rng(config.seed)  # the same patients are drawn for both
        values[name] = float(measures.statistic(np.ones((len(ids), 1)))[place, 0])
        drawn[name] = replicate(measures.statistic, ids, config.evaluate.bootstrap, rng)[place]
    arms = []
    for name, value in values.items():
        low, high = interval_ends(drawn[name], enough=enough and not np.isnan(value))
        own = {"value": None if np.isnan(value) else value, "low": low, "high": high}
        pair = (drawn[name], drawn["local"])
        gain = paired_difference((value, values["local"]), pair, test=False, enough=enough)
        more = None if name == "local" else {"value": gain.value, "low": gain.low, "high": gain.high}
        arms.append({"arm": name, "kind": name, **own, "n": patients, "gain_over_local": more})
    return arms


def _rounds_of(state_dir: Path, run: str) -> Path:
    """Where the rounds of a run's baseline are kept; the server chose the run's name, so it names no folder itself."""
    return state_dir / FOLDER / hashlib.sha256(run.encode()).hexdigest()[:12]


def _measures(network: FlatNetwork, data: Dataset, rows: Rows, config: RunConfig) -> tuple[Measures, list[str]]:
    """The metrics of a network at some rows, and whose image each of its cases is."""
    chosen, logits, targets = zip(*predictions(network, data, rows), strict=True)
    ids = [data.patients[row] for part in chosen for row in part]
    if config.task.kind == "classification":
        return classification_measures(np.concatenate(logits), np.concatenate(targets), config.task.labels), ids
    cases = [scored_cases(*pair, config.scored_spacing_mm) for pair in zip(logits, targets, strict=True)]
    return segmentation_measures(join_cases(cases), config.task.labels), ids


def _kept(state_dir: Path, which: Which) -> KeptNetwork:
    try:
        with safe_open(state_dir / FOLDER / f"{which}.safetensors", framework="np") as file:
            facts = file.metadata() or {}
            weights = Weights(parameters=file.get_tensor("parameters"), buffers=file.get_tensor("buffers"))
        return KeptNetwork(weights=weights, settings=facts["settings"], run=facts["run"])
    except (OSError, SafetensorError, KeyError):
        missing = {
            "first": "this site was not in the first round of any run",
            "final": "no run has ended yet with this site in its last round; wait for its end",
        }
        raise DataError(missing[which]) from None
