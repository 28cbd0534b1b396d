"""One site, one task: the only way in which fedmed trains or evaluates at a hospital.

`fedmed simulate`, `flwr run` and a real hospital all end in `train_round` and `evaluate_round`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.imaging.dataset import Dataset, load_dataset
from fedmed.metrics import Form
from fedmed.training.evaluate import evaluation_sums, mean_loss
from fedmed.training.loop import Circumstances, train_
from fedmed.training.losses import loss_for
from fedmed.training.network import FlatNetwork, resident_network
from fedmed.training.sampling import Rows, balanced_positive_weights, balanced_weights
from fedmed.training.unfinished import Unfinished
from fedmed.types import Scalar, Sums, Task, Update


@dataclass(frozen=True, kw_only=True)
class Site:
    """A hospital as its own training process sees it. Everything here stays at the hospital."""

    name: str
    manifest: Path
    dataset: str = ""  # "module:function" for data that are no images
    cache_dir: Path | None = None  # decoded images; None keeps them in memory
    cache_gib: float = 50.0  # above it, the sets that were used longest ago leave the cache
    state_dir: Path | None = None  # what the site keeps between tasks, such as an unfinished round; None = nothing
    device: str = "cpu"
    metrics: Form = "histogram"  # in which form its evaluation may leave
    networks: tuple[str, ...] | None = None  # "module:function" networks that it will import; None = any


def settings_for_sites(config: RunConfig) -> str:
    """The part of a run configuration that sites are sent: everything but names of files and of code."""
    values = run_file.nested(config)
    for key in ("sites", "server", "dataset", "cache-gib"):
        values["data"].pop(key)
    values["model"].pop("weights")
    values.pop("simulation")
    return json.dumps(values, sort_keys=True)


@lru_cache(maxsize=8)
def settings_from(text: str) -> RunConfig:
    """The inverse of `settings_for_sites`."""
    return run_file.validate(json.loads(text), source="the server's task")


def train_round(task: Task, site: Site) -> Update:
    """Train the received network on the site's own images.

    If the task asks for it, the received network is first evaluated on the patients that the site holds out, so that
    one exchange with the server serves both.

    Raises:
        DataError: the site's data cannot be used.
        ModelError: the site builds another network than the server sent weights for.
    """
    started = time.perf_counter()
    config, data, network = _prepared(task, site)
    metrics = _held_out_sums(network, data, config, task, site) if task.evaluate else {}
    rows = np.flatnonzero(~data.evaluation)
    generator = site_generator(config.seed, site.name, task.round)
    loss = loss_for(config.task, config.train, _positive_weights(network, data, rows, config))
    unfinished = _unfinished(task, site, config)
    given = Circumstances(
        round=task.round,
        plateau=task.learning_rate_factor,
        weights=balanced_weights(data, rows, config.task) if config.train.sampling == "balanced" else None,
        unfinished=unfinished,
        validation=_validation(network, data, config),
    )
    trained = train_(network, data, rows, config.train, loss, generator, given)
    if unfinished is not None:
        unfinished.clear()
    facts: dict[str, Scalar] = {
        "patients": len({data.patients[row] for row in rows}),
        "loss": trained.loss,
        "steps": trained.steps,
        "seconds": time.perf_counter() - started,
    }
    return _update(network, len(rows), metrics, facts)


def evaluate_round(task: Task, site: Site) -> Update:
    """Evaluate the received network on the patients that the site holds out; its weights do not come back.

    Raises:
        DataError: the site's data cannot be used.
        ModelError: the site builds another network than the server sent weights for.
    """
    started = time.perf_counter()
    config, data, network = _prepared(task, site)
    metrics = _held_out_sums(network, data, config, task, site)
    facts: dict[str, Scalar] = {"seconds": time.perf_counter() - started}
    return _update(network, int(data.evaluation.sum()), metrics, facts, weights=False)


def site_card(task: Task, site: Site) -> dict[str, Scalar]:
    """What a site says of itself before the first round: how many patients and images it brings."""
    data = site_data(site, task.settings)
    return {
        "site": site.name,
        "patients": len(set(data.patients)),
        "images": len(data),
        "unreadable": len(data.unreadable),
        "reasons": "; ".join(f"{reason}: {count}" for reason, count in data.reasons.items()),
        "held-out-patients": len({data.patients[row] for row in np.flatnonzero(data.evaluation)}),
    }


def site_generator(seed: int, site: str, round: int) -> np.random.Generator:
    """The generator of one site in one round: the same for any number of workers and any order of sites."""
    digest = hashlib.sha256(f"{seed}/{site}/{round}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@lru_cache(maxsize=256)
def site_data(site: Site, settings: str) -> Dataset:
    """The site's data set, kept by this process between tasks."""
    config = settings_from(settings)
    if site.dataset:
        return custom_dataset(site.dataset)(site.manifest, config)
    return load_dataset(
        site.manifest,
        task=config.task,
        preset=config.data.preset,
        image_size=config.data.image_size,
        in_channels=config.model.in_channels,
        max_unreadable=config.data.max_unreadable,
        site_share=config.evaluate.site_share,
        seed=config.split_seed,
        name=site.name,
        cache_dir=site.cache_dir,
        items=config.data.items,
        spacing_mm=config.data.spacing_mm,
        volume_size=config.data.volume_size,
        cache_gib=site.cache_gib,
    )


def custom_dataset(reference: str) -> Callable[[Path, RunConfig], Dataset]:
    """The function behind a "module:function" in `data.dataset`.

    Raises:
        ConfigError: the module or the function does not exist.
    """
    module, _, name = reference.partition(":")
    try:
        function: Callable[[Path, RunConfig], Dataset] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'data.dataset = "{reference}": expected "module:function" ({error})') from None
    return function


def _prepared(task: Task, site: Site) -> tuple[RunConfig, Dataset, FlatNetwork]:
    config = settings_from(task.settings)
    if site.networks is not None and ":" in config.model.name and config.model.name not in site.networks:
        text = (
            f'this site imports no network "{config.model.name}"; it would have to stand in networks of its site.toml'
        )
        raise ConfigError(text, public=text)
    torch.set_num_threads(config.train.threads)
    data = site_data(site, task.settings)
    network = resident_network(config.model, len(config.task.labels), config.seed, site.device, config.dimensions)
    if network.layout.hash != task.layout:
        raise ModelError("the server's network has another layout than the one built here; compare the versions")
    network.load_(task.weights)
    return config, data, network


def _held_out_sums(network: FlatNetwork, data: Dataset, config: RunConfig, task: Task, site: Site) -> Sums:
    rows: Rows = np.flatnonzero(data.evaluation)
    return evaluation_sums(
        network, data, rows, config.task, form=site.metrics, centres=task.centres, spacing_mm=config.data.spacing_mm
    )


def _positive_weights(network: FlatNetwork, data: Dataset, rows: Rows, config: RunConfig) -> torch.Tensor | None:
    """What a positive of each label weighs in the loss, ready to be broadcast over pixels."""
    if config.train.class_weights == "none":
        return None
    weights = torch.from_numpy(balanced_positive_weights(data, rows)).to(network.device)
    pixels = 0 if config.task.kind == "classification" else config.dimensions
    return weights.view(-1, *[1] * pixels)


def _validation(network: FlatNetwork, data: Dataset, config: RunConfig) -> Callable[[], float] | None:
    """The loss on the patients that the site holds out, for early stopping within a round."""
    rows = np.flatnonzero(data.evaluation)
    if not config.train.patience or len(rows) == 0:
        return None
    return partial(mean_loss, network, data, rows, loss_for(config.task, config.train))


def _unfinished(task: Task, site: Site, config: RunConfig) -> Unfinished | None:
    """Where a long round is saved: known again by its settings, its number and the very weights that it began with."""
    if site.state_dir is None or config.train.save_every_s == 0:
        return None

    def identity() -> str:
        digest = hashlib.sha256(f"{task.settings}/{task.round}/{task.layout}/{task.learning_rate_factor}/".encode())
        for vector in (task.weights.parameters, task.weights.buffers):
            digest.update(np.ascontiguousarray(vector).data)
        return digest.hexdigest()

    path = site.state_dir / "unfinished-round.safetensors"
    return Unfinished(path=path, identify=identity, every_s=config.train.save_every_s)


def _update(
    network: FlatNetwork, num_examples: int, metrics: Sums, facts: dict[str, Scalar], *, weights: bool = True
) -> Update:
    return Update(
        weights=network.weights() if weights else None,
        layout=network.layout.hash,
        num_examples=num_examples,
        metrics=MappingProxyType(dict(metrics)),
        facts=MappingProxyType(facts),
    )
