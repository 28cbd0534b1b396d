"""What of a run file goes to real hospitals."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fedmed import config as run_file
from fedmed.config import RunConfig, SimulationConfig
from fedmed.errors import ConfigError
from fedmed.federated.combiners import too_few_sites
from fedmed.federated.strategies import server_step


def deployable(config: RunConfig, sites: Sequence[str]) -> RunConfig:
    """A run file as it is submitted: real hospitals read their own site.toml, so what names data there is left out.

    Args:
        config: the run file.
        sites: that may connect.

    Raises:
        ConfigError: it asks for what only a simulation can do, or for what no server does, has no labels, or needs
            more sites than may connect, others, or fewer.
    """
    default, asked = SimulationConfig(), config.simulation
    for key in ("partition", "policy"):
        if getattr(asked, key) != getattr(default, key):
            raise ConfigError(
                f"simulation.{key} is for fedmed simulate; real hospitals have data and policies of their own"
            )
    if not config.task.labels:
        raise ConfigError("task.labels: name the labels; a run without them is the demo, which is simulated")
    if len(sites) < config.strategy.min_sites:
        least = config.strategy.min_sites
        raise ConfigError(
            f"strategy.min-sites = {least}, but {len(sites)} sites are provisioned; fedmed server provision"
        )
    unknown = sorted(set(config.strategy.required_sites) - set(sites))
    if unknown:
        near = difflib.get_close_matches(unknown[0], sites, n=1, cutoff=0.0)[0]
        raise ConfigError(f'strategy.required-sites: no site "{unknown[0]}" is provisioned; did you mean "{near}"?')
    if few := too_few_sites(config.strategy, len(sites)):
        raise ConfigError(f"{few} provisioned")
    if 0 < config.privacy.sites < len(sites):
        meant = config.privacy.sites
        raise ConfigError(
            f"privacy.sites = {meant}, but {len(sites)} sites are provisioned, and who comes last would be refused; "
            f"set it to {len(sites)}, or take sites out"
        )
    if ":" not in config.strategy.name:  # an algorithm of one's own lies at the server
        server_step(config)
    values = run_file.nested(config)
    values["data"]["sites"] = list(sites)
    values["simulation"] = run_file.nested(RunConfig())["simulation"]
    return run_file.validate(values)
