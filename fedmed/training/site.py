"""A hospital as its own training process sees it: what it is told of a run, and its data. All of it stays there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.dataset import Dataset
from fedmed.metrics import Form
from fedmed.training.oversight import Oversight, site_keys
from fedmed.training.run_data import run_data


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
    min_held_out: int = 0  # patients, below whom no metric leaves, nor anything of a label; a policy has its own
    networks: tuple[str, ...] | None = None  # "module:function" networks that it will import; None = any
    oversight: Oversight | None = None  # the hospital's policy, ledger and logs; None = it has none
    virtual: bool = False  # a hospital of a simulation
    withdrawn: frozenset[str] = frozenset()  # ids of patients who opted out: no task sees them
    keys: Path | None = None  # the folder of its keys; a virtual one signs nothing
    peers: tuple[tuple[str, str], ...] = ()  # (name, public signing key) of the sites that it may sum with, by its kit


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
    """The inverse of `settings_for_sites`.

    Raises:
        ConfigError: it is no run, or names a file of the site.
    """
    config = run_file.validate(json.loads(text), source="the server's task")
    if config.model.weights or config.data.sites or config.data.server or config.data.dataset:
        problem = "the server's task names files; what a site reads stands in its own site.toml"
        raise ConfigError.told(problem)
    return config


@lru_cache(maxsize=256)
def site_data(site: Site, settings: str) -> Dataset:
    """The site's data set, kept by this process between tasks.

    Raises:
        DataError: it cannot be used. Under differential privacy a server is not told why, and rows that cannot be
            read, or do not fit the task, are left out however many they are: both tell of single images.
            `fedmed data check` says so beforehand.
    """
    config = settings_from(settings)
    if config.privacy.mode == "none" or site.virtual:
        return _site_data(site, config)
    try:
        return _site_data(site, config, lenient=True)
    except DataError as error:
        raise DataError(str(error)) from None


def _site_data(site: Site, config: RunConfig, *, lenient: bool = False) -> Dataset:
    return run_data(
        site.manifest,
        config,
        name=_split_name(site),
        dataset=site.dataset,
        site_share=config.evaluate.site_share,
        seed=config.split_seed,
        cache_dir=site.cache_dir,
        cache_gib=site.cache_gib,
        withdrawn=site.withdrawn,
        lenient=lenient,
    )


def _split_name(site: Site) -> str:
    """What decides, with a patient's id and the run's split-seed, who is held out.

    At a real hospital it is secret: else a server, which chooses share and seed, could choose them so that the number
    of patients held out tells whether somebody is there.
    """
    if site.oversight is None or site.virtual:
        return site.name
    return f"{site.name}/{site_keys(site.oversight).link('split', b'').hex()}"
