"""Which hospital a process stands for: a deployed one reads its own site.toml, a virtual one the run's `data.sites`."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.federated.identity import package_hash
from fedmed.federated.phantoms import with_phantoms
from fedmed.federated.site_config import read_peers, read_site_config, withdrawn_of
from fedmed.imaging.cache import cache_folder
from fedmed.privacy.policy import MetricRules, read_policy
from fedmed.training.oversight import Oversight
from fedmed.training.site import Site

SIMULATION = "FEDMED_SIMULATION"  # environment: the run file of a simulation on Flower's engines


def site_name(reference: str) -> str:
    """The name of a virtual hospital: the folder of its manifest, or the last part of any other reference."""
    path = Path(reference)
    return path.parent.name if path.suffix.lower() == ".csv" else path.name


def site_names(config: RunConfig) -> tuple[str, ...]:
    """The names of all virtual hospitals, in the order of `data.sites`.

    Raises:
        ConfigError: two sites have the same name.
    """
    names = tuple(map(site_name, config.data.sites))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f'data.sites: two sites are called "{twice[0]}"; a site is named by its manifest\'s folder')
    return names


def site_of(node: Mapping[str, Any], flat: Mapping[str, Any]) -> Site:
    """The site that a Flower node stands for.

    A node whose own configuration names a site.toml is that hospital. `data.sites` of the run counts only where the
    node is virtual: in fedmed's workers, or inside Flower's Ray simulation. What a server sends never names a file.

    Args:
        node: the node's own configuration.
        flat: the run configuration that came with the app.

    Raises:
        ConfigError: there is no site.toml at a deployed node, it is wrong, or there is no such partition.
    """
    if node.get("site"):
        return site_at(Path(str(node["site"])))
    if not node.get("virtual") and "ray" not in sys.modules:
        raise ConfigError("start this SuperNode with --node-config 'site=\"/path/to/site.toml\"'")
    sites = virtual_sites(os.environ.get(SIMULATION, ""), tuple(flat.items()), str(node.get("device", "cpu")))
    number = int(node["partition-id"])
    if number >= len(sites):
        raise ConfigError(f"there are {len(sites)} data.sites, but more virtual nodes; make them equal")
    run = os.environ.get(SIMULATION, "")  # over Ray the run file lies where states do, in RUN/sites
    states = str(node.get("states", "") or (Path(run).parent if run else ""))
    return _at(sites[number], Path(states)) if states else _without_records(sites[number])


def site_at(path: Path) -> Site:
    """The hospital of a site.toml, without the patients who have withdrawn by now.

    Raises:
        ConfigError, DataError: the file, or the list of who withdrew, cannot be used.
    """
    return replace(read_site(path), withdrawn=withdrawn_of(path))


def _at(site: Site, states: Path) -> Site:
    """A virtual hospital that keeps what it keeps in a folder of that name."""
    folder = states / site.name
    oversight = site.oversight and replace(site.oversight, folder=folder, keys=folder / "keys")
    return replace(site, state_dir=folder, oversight=oversight)


def _without_records(site: Site) -> Site:
    """A virtual hospital without a folder of its own, as under `flwr run . local`.

    Raises:
        ConfigError: it has to keep a ledger, which would have nowhere to be.
    """
    if site.oversight is not None:
        text = "simulation.policy and privacy.mode need a folder for every hospital's ledger; use fedmed simulate"
        raise ConfigError.told(text)
    return site


@lru_cache(maxsize=4)
def virtual_sites(path: str, flat: tuple[tuple[str, Any], ...], device: str) -> tuple[Site, ...]:
    """All virtual hospitals of a simulation, from its run file or from Flower's run configuration."""
    config = with_phantoms(run_file.load(Path(path)) if path else run_file.unflatten(dict(flat)))
    oversight = None
    if config.simulation.policy or config.privacy.mode == "dp-sgd":
        nowhere = Path()  # until the node says where its state lies
        rules = Path(config.simulation.policy) if config.simulation.policy else None
        oversight = Oversight(policy=rules, folder=nowhere, keys=nowhere, code=package_hash())
    return tuple(
        Site(
            name=name,
            manifest=Path(reference),
            dataset=config.data.dataset,
            cache_dir=cache_folder(),
            cache_gib=config.data.cache_gib,
            device=device,
            metrics="exact" if oversight else "histogram",  # no stricter than the policy
            oversight=oversight,
            virtual=True,
        )
        for name, reference in zip(site_names(config), config.data.sites, strict=True)
    )


@lru_cache(maxsize=4)
def read_site(path: Path) -> Site:
    """Read a hospital's site.toml, once in a process: anew for every task, as each is one. Paths are relative to it.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    values = read_site_config(path)
    cache = path.parent / values.cache_dir if values.cache_dir else None
    manifest = path.parent / values.manifest
    oversight = None
    if values.policy is not None:
        read_policy(path)
        folder, keys = path.parent / (values.state_dir or "state"), path.parent / values.keys_dir
        oversight = Oversight(policy=path, folder=folder, keys=keys, code=package_hash())
    return Site(
        name=values.name,
        manifest=manifest,
        dataset=values.dataset,
        cache_dir=cache,
        cache_gib=values.cache_gib,
        state_dir=path.parent / values.state_dir if values.state_dir else None,
        device=values.device,
        metrics=values.metrics,
        min_held_out=MetricRules().min_patients,
        networks=values.networks,
        oversight=oversight,
        keys=path.parent / values.keys_dir,
        peers=read_peers(path.parent),
    )
