"""What one network says of every patient that is held out anywhere: the rows of the cross-site matrix.

Where a run gave every site a network of its own (FedBN, Ditto, fine-tuning), a site's patients are judged by that one.

Cases are kept one by one, beside the run, so that networks can be compared in pairs. The file holds scores, targets,
numbers of manifest rows, and a number in place of each patient. Like the run folder it stays on this machine.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.durable import sha256_of, write_atomically
from fedmed.errors import ConfigError, DataError
from fedmed.federated.identity import package_hash
from fedmed.federated.server_evaluation import chosen_by, load_server_data, server_device
from fedmed.federated.sites import site_names
from fedmed.imaging.cache import cache_folder
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.split import evaluation_rows
from fedmed.metrics import Cases, Measures, classification_measures, join_cases, segmentation_measures
from fedmed.training.evaluate import predictions, scored_cases
from fedmed.training.local_algorithms.fine_tune import has_personal_network
from fedmed.training.network import FlatNetwork
from fedmed.training.predict.kept import kept_network
from fedmed.training.site import Site, settings_for_sites, site_data

FILE = "predictions.safetensors"
SERVER = "server"  # the name of its place; no site may be called so


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where networks are judged: a site's held-out patients, or the server's test part."""

    name: str
    kind: Literal["site", "server"]
    path: str  # manifest, or whatever else stands for the data


@dataclass(frozen=True, kw_only=True)
class Judged:
    """N cases of one place as one network sees them."""

    row: NDArray[np.int64]  # (N,) line of the manifest, or number of the item
    patient: NDArray[np.int64]  # (N,) number of the patient, in the order in which the whole data set names them
    scores: Mapping[str, NDArray[np.generic]]  # (N, …) logits and targets, or the fields of Cases

    @property
    def patients(self) -> tuple[str, ...]:
        """N names, made up of the numbers."""
        return tuple(map(str, self.patient))

    def measures(self, labels: tuple[str, ...]) -> Measures:
        """The metrics of the cases."""
        if "logits" in self.scores:
            return classification_measures(
                self.scores["logits"].astype(np.float64), self.scores["targets"].astype(np.float64), labels
            )
        return segmentation_measures(Cases(**{name: v.astype(np.float64) for name, v in self.scores.items()}), labels)

    def select(self, keep: NDArray[np.bool_]) -> Judged:
        """The cases where `keep` (N,) is true."""
        scores = {name: values[keep] for name, values in self.scores.items()}
        return Judged(row=self.row[keep], patient=self.patient[keep], scores=scores)


def places_of(config: RunConfig) -> tuple[Place, ...]:
    """Every site, in the order of `data.sites`, and the server if it has a set.

    Raises:
        ConfigError: a site is called as the server is.
    """
    if SERVER in site_names(config):
        raise ConfigError(f'data.sites: a site is called "{SERVER}", as the server\'s set is; rename its folder')
    sites = zip(site_names(config), config.data.sites, strict=True)
    places = [Place(name=name, kind="site", path=path) for name, path in sites]
    server = [Place(name=SERVER, kind="server", path=config.data.server)] if config.data.server else []
    return (*places, *server)


def check_endpoint(config: RunConfig) -> None:
    """Refuse a declared endpoint that nobody could judge, before anything is trained.

    A data set of the user's own is trusted to hold somebody out, and made only if `evaluate.site-share` is 0.

    Args:
        config: the run, with every path absolute.

    Raises:
        ConfigError: the server has no set, or no site holds anybody out.
        DataError: a manifest cannot be used.
    """
    if config.evaluate.endpoint == "server":
        if not config.data.server:
            raise ConfigError('evaluate.endpoint = "server", but data.server names no set')
    elif not any(_holds_out(place, config) for place in places_of(config) if place.kind == "site"):
        raise ConfigError('evaluate.endpoint = "sites", but nobody is held out at any site; set evaluate.site-share')


def write_predictions(run: Path, judges: RunConfig) -> None:
    """Predict for all held-out patients with the network that a run kept, unless that was done before.

    Args:
        run: its folder.
        judges: whose sites' held-out patients, and whose server's test part, are predicted for.

    Raises:
        ModelError: the run kept no network, or has none for the server's patients.
        DataError: a place's data cannot be used.
    """
    own = has_personal_network(run_file.load(run / "run.toml").strategy)
    mark = _mark(judges, own)
    if _mark_in(run / FILE) == mark:
        return
    arrays: dict[str, NDArray[np.generic]] = {}
    for number, place in enumerate(places_of(judges)):
        site = place.name if own and place.kind == "site" else ""
        network, _, _ = kept_network(run, device=server_device(judges), site=site)
        data, rows = _held_out(place, judges)
        for name, values in _predicted(network, data, rows, judges).items():
            arrays[f"{number}/{name}"] = np.ascontiguousarray(values)
    write_atomically(run / FILE, save(arrays, {"mark": mark}), mode=0o600)


def read_predictions(run: Path, judges: RunConfig) -> dict[str, Judged]:
    """What `write_predictions` wrote: by place, without the places that hold nobody out."""
    found: dict[str, Judged] = {}
    with safe_open(run / FILE, framework="numpy") as file:
        keys = list(file.keys())
        for number, place in enumerate(places_of(judges)):
            mine = {key.partition("/")[2]: file.get_tensor(key) for key in keys if key.startswith(f"{number}/")}
            if mine:
                found[place.name] = Judged(row=mine.pop("row"), patient=mine.pop("patient"), scores=mine)
    return found


def _holds_out(place: Place, config: RunConfig) -> bool:
    share = config.evaluate.site_share
    if config.data.dataset:
        return share > 0 or _own_data_hold_out(place, config)
    manifest = read_manifest(Path(place.path), config.task)
    return bool(evaluation_rows(manifest, share, config.split_seed, place.name).any())


def _own_data_hold_out(place: Place, config: RunConfig) -> bool:
    """Whether the user's function holds anybody out; asked in a process that ends, as runs are forked from this one.

    Raises:
        DataError: it ended its process.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as apart:
            return apart.submit(_held_out_count, place, config).result() > 0
    except BrokenProcessPool:
        why = "ended its process: by itself, in a library that crashed, or for want of memory"
        raise DataError(f'data.dataset: called for {place.name}, "{config.data.dataset}" {why}') from None


def _held_out_count(place: Place, config: RunConfig) -> int:
    return len(_held_out(place, config)[1])


def _held_out(place: Place, config: RunConfig) -> tuple[Dataset, NDArray[np.int64]]:
    if place.kind == "server":
        data = load_server_data(config, cache_folder())
        return data, np.flatnonzero(~chosen_by(config, data))
    site = Site(
        name=place.name,
        manifest=Path(place.path),
        dataset=config.data.dataset,
        cache_dir=cache_folder(),
        cache_gib=config.data.cache_gib,
        virtual=True,
    )
    data = site_data(site, settings_for_sites(config))
    return data, np.flatnonzero(data.evaluation)


def _predicted(
    network: FlatNetwork, data: Dataset, rows: NDArray[np.int64], config: RunConfig
) -> dict[str, NDArray[np.generic]]:
    if len(rows) == 0:
        return {}
    chosen, cases, logits, targets = [], [], [], []
    for some, predicted, true in predictions(network, data, rows):
        chosen.append(some)
        if config.task.kind == "segmentation":
            cases.append(scored_cases(predicted, true, config.scored_spacing_mm))
        else:
            logits.append(predicted)
            targets.append(true)
    order = np.concatenate(chosen)
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(data.patients))}
    scores: dict[str, NDArray[np.generic]]
    if cases:
        joined = join_cases(cases)
        scores = {field.name: getattr(joined, field.name) for field in fields(Cases)}
    else:
        scores = {"logits": np.concatenate(logits), "targets": np.concatenate(targets)}
    return {
        **scores,
        "row": data.rows[order],
        "patient": np.array([numbers[data.patients[row]] for row in order], np.int64),
    }


def _mark(config: RunConfig, own: bool) -> str:
    """What the predictions of a network depend on besides the network."""
    values = run_file.nested(config)
    facts = [package_hash(), values["data"], values["task"], config.split_seed, config.evaluate.site_share]
    facts += [config.evaluate.selection_share, *(["own networks"] if own else [])]
    facts += [sha256_of(Path(p.path)) for p in places_of(config) if Path(p.path).is_file()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _mark_in(path: Path) -> str:
    try:
        with safe_open(path, framework="numpy") as file:
            return str((file.metadata() or {}).get("mark", ""))
    except (OSError, SafetensorError):
        return ""
