"""`site.toml` as values. Apart from what trains, so that a hospital's commands answer without torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedmed import config as run_file
from fedmed.config import Section
from fedmed.errors import ConfigError
from fedmed.intake.opt_out import opted_out
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.privacy.keys import read_keys
from fedmed.privacy.policy import SitePolicy


class SiteConfig(Section):
    """`site.toml`: what a hospital says of itself. Never sent, and never overridden by a server."""

    name: run_file.Name
    manifest: str
    opt_out: str = ""  # a table of patients who withdrew, read anew for every task
    dataset: str = ""
    cache_dir: str = ""
    cache_gib: Annotated[float, Field(gt=0)] = 50.0
    state_dir: str = "state"
    device: str = "cpu"
    metrics: Literal["histogram", "none"] = "histogram"  # in which form evaluations of its patients may leave
    networks: tuple[str, ...] = ()  # "module:function" networks that a server may ask for
    keys_dir: str = "keys"  # the site's two keys, made when they are first needed; apart from state-dir
    task_memory_gib: Annotated[float, Field(ge=0)] = 0.0  # that a task's process may have for itself; 0 = no limit
    task_cpus: Annotated[int, Field(ge=0)] = 0  # processors that a task may use; 0 = all
    task_stalls_after_s: Annotated[float, Field(ge=0)] = 600.0  # without progress, until a task is ended; 0 = never
    approved_apps: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()  # SHA-256; empty = all in the kit
    health_port: Annotated[int, Field(ge=0, le=65535)] = 0  # of 127.0.0.1, for GET /health; 0 = off
    log_to: Literal["file", "syslog", "journal"] = "file"  # where the runner's log goes
    policy: SitePolicy | None = None  # without it the site keeps no ledger and no logs


def read_site_config(path: Path) -> SiteConfig:
    """The values of a hospital's site.toml, as they stand in it.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    try:
        return SiteConfig.model_validate(run_file.tuples(tomllib.loads(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__})") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def withdrawn_of(path: Path) -> frozenset[str]:
    """Whatever a manifest may call the patients who have withdrawn by now: their list is read anew for every task.

    Args:
        path: of the hospital's site.toml.

    Raises:
        ConfigError: the site.toml is missing or wrong.
        DataError: the list cannot be read.
        LedgerUnusable: the site's keys, without which nobody's pseudonym is known, cannot be read.
    """
    values = read_site_config(path)
    if not values.opt_out:
        return frozenset()
    pseudonyms = Pseudonyms(keys=read_keys(path.parent / values.keys_dir))
    return opted_out(path.parent / values.opt_out, pseudonyms)
