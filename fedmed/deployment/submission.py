"""What of a run file goes to real hospitals."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from fedmed import config as run_file
from fedmed.config import RunConfig, SimulationConfig
from fedmed.errors import ConfigError
from fedmed.federated.combiners import too_few_sites
from fedmed.federated.selection import sample_size
from fedmed.federated.strategies import server_step
from fedmed.federated.virtual_hospitals import check_files


def deployable(config: RunConfig, sites: Sequence[str]) -> RunConfig:
    """A run file as it is submitted: real hospitals read their own site.toml, so what names data there is left out.

    Args:
        config: the run file.
        sites: that may connect.

    Raises:
        ConfigError: it asks for what only a simulation can do or what its algorithm does not define, has no labels, or
            needs more sites, or fewer, than may connect.
    """
    default, asked, strategy = SimulationConfig(), config.simulation, config.strategy
    for key in ("partition", "policy"):
        if getattr(asked, key) != getattr(default, key):
            raise ConfigError(
                f"simulation.{key} is for fedmed simulate; real hospitals have data and policies of their own"
            )
    if not config.task.labels:
        raise ConfigError("task.labels: name the labels; a run without them is the demo, which is simulated")
    if len(sites) < strategy.min_sites:
        least = strategy.min_sites
        raise ConfigError(
            f"strategy.min-sites = {least}, but {len(sites)} sites are provisioned; fedmed server provision"
        )
    unknown = sorted(set(strategy.required_sites) - set(sites))
    if unknown:
        near = difflib.get_close_matches(unknown[0], sites, n=1, cutoff=0.0)[0]
        raise ConfigError(f'strategy.required-sites: no site "{unknown[0]}" is provisioned; did you mean "{near}"?')
    if ":" not in strategy.name:  # code of one's own is installed at the server, and perhaps not here
        server_step(config)
    too_few = too_few_sites(strategy, sample_size(len(sites), fraction=strategy.fraction, least=strategy.min_sites))
    if too_few:
        raise ConfigError(too_few)
    if config.privacy.mode == "central" and 0 < config.privacy.sites < len(sites):
        raise ConfigError(
            f"privacy.sites = {config.privacy.sites}, but {len(sites)} sites are provisioned, and which of them come "
            "first must not decide who joins; set it to their number, or to 0, which means it"
        )
    values = run_file.nested(config)
    values["data"]["sites"] = list(sites)
    values["simulation"] = run_file.nested(RunConfig())["simulation"]
    return run_file.validate(values)


def check_paths(config: RunConfig) -> None:
    """Look that a run names the server's files as the server has them, where it is submitted from another machine.

    Raises:
        ConfigError: a path is relative, or begins with ~.
    """
    for key, path in (("data.server", config.data.server), ("model.weights", config.model.weights)):
        if path and not Path(path).is_absolute():
            raise ConfigError(f"{key}: {path} is read on the server's machine; write its whole path there, from / on")


def check_own_files(config: RunConfig) -> None:
    """Look for what a run names on the server's own machine, before sites wait for it.

    Raises:
        ConfigError: there are no such weights.
        DataError: the server's set lacks a label of the task, or too many images.
    """
    if config.model.weights and not Path(config.model.weights).is_file():
        raise ConfigError(f"model.weights: {config.model.weights}: no such file")
    check_files(config.model_copy(update={"data": config.data.model_copy(update={"sites": ()})}))
