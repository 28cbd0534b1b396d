"""`site.toml` as values. Apart from what trains, so that a hospital's commands answer without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedmed.config import Name, Section, checked, read_toml
from fedmed.errors import ConfigError
from fedmed.intake.opt_out import opted_out
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.same_keys import made_with
from fedmed.privacy.keys import read_keys
from fedmed.privacy.policy import Form, SitePolicy

PEERS = Path("consortium/sites.json")  # beside a site.toml: the sites that the joined kit names, with their public keys


class SiteConfig(Section):
    """`site.toml`: what a hospital says of itself. Never sent, and never overridden by a server."""

    name: Annotated[Name, Field(description="the site's name in the federation")]
    manifest: Annotated[
        str, Field(description="the CSV of images: patient_id, image, and mask or one column per label")
    ]
    opt_out: Annotated[
        str,
        Field(
            description="a CSV of patients who withdrew, by id or pseudonym. It is read anew for every task, and "
            "nobody in it takes part"
        ),
    ] = ""
    dataset: Annotated[str, Field(description='"module:function" for data that are no images')] = ""
    cache_dir: Annotated[str, Field(description="where decoded images are kept; empty = memory only")] = ""
    cache_gib: Annotated[float, Field(gt=0, description="size of that in GiB")] = 50.0
    state_dir: Annotated[
        str,
        Field(
            description="what the site keeps between rounds, and its ledger, audit log and egress manifest. Back it up"
        ),
    ] = "state"
    device: Annotated[str, Field(description='where it trains: "cpu", "cuda", or "cuda:1"')] = "cpu"
    metrics: Annotated[
        Form,
        Field(
            description="in which form evaluations of its patients may leave: `histogram`, sums and histograms of "
            "scores; `exact`, label and score of every image; `none`"
        ),
    ] = "histogram"
    networks: Annotated[
        tuple[str, ...],
        Field(description='networks of the form "module:function" that a server may ask this site to import'),
    ] = ()
    keys_dir: Annotated[str, Field(description="the site's keys. Never in the ledger's folder")] = "keys"
    task_memory_gib: Annotated[
        float,
        Field(
            ge=0,
            description="memory in GiB that each process of a task may have for itself; 0 = no limit. fedmed site "
            "check says what it needs",
        ),
    ] = 0.0
    task_cpus: Annotated[int, Field(ge=0, description="processors that a task may use; 0 = all")] = 0
    task_stalls_after_s: Annotated[
        float,
        Field(
            ge=0,
            description="seconds in which a task neither computes nor reads, after which it is ended; 0 = only at its "
            "round's deadline",
        ),
    ] = 600.0
    task_longest_s: Annotated[
        float,
        Field(gt=0, le=86_400, description="seconds after which a task is ended, whatever it does and a run allows"),
    ] = 86_400.0
    require_confinement: Annotated[
        bool,
        Field(
            description="whether tasks are refused where the system does not keep them from every network, and from "
            "writing outside their own folders. fedmed site check says what it does"
        ),
    ] = False
    approved_apps: Annotated[
        tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...],
        Field(description="SHA-256 of the apps that runs may bring; empty = all that the kit names"),
    ] = ()
    health_port: Annotated[
        int, Field(ge=0, le=65535, description="port of 127.0.0.1 that answers GET /health; 0 = none")
    ] = 0
    log_to: Annotated[
        Literal["file", "syslog", "journal"],
        Field(description='where the runner\'s log goes: "file" (logs/site.log), "syslog" or "journal"'),
    ] = "file"
    policy: Annotated[
        SitePolicy | None,
        Field(
            description="what this hospital allows. With this table it keeps a ledger, an audit log and an egress "
            "manifest"
        ),
    ] = None


def read_site_config(path: Path) -> SiteConfig:
    """The values of a hospital's site.toml, as they stand in it.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    values = read_toml(path, missing="no such file; fedmed site init makes one")
    return checked(SiteConfig, values, source=str(path))


def read_peers(site: Path) -> tuple[tuple[str, str], ...]:
    """Name and public key of the sites that the joined kit names, by name; none without a kit.

    Args:
        site: the folder of the site.toml.

    Raises:
        ConfigError: the file is damaged.
    """
    path = site / PEERS
    try:
        values = json.loads(path.read_text("utf-8"))
        return tuple(sorted((str(name), bytes.fromhex(key).hex()) for name, key in values.items()))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"{path} is damaged; fedmed site join the kit again") from None


def withdrawn_of(path: Path) -> frozenset[str]:
    """Whatever a manifest may call the patients who have withdrawn by now: their list is read anew for every task.

    Args:
        path: of the hospital's site.toml.

    Raises:
        ConfigError: the site.toml is missing or wrong.
        DataError: the list cannot be read, or the manifest's pseudonyms were made with other keys, so that nobody of
            the list would be found.
        LedgerUnusable: the site's keys, without which nobody's pseudonym is known, cannot be read.
    """
    values = read_site_config(path)
    if not values.opt_out:
        return frozenset()
    pseudonyms = Pseudonyms(keys=read_keys(path.parent / values.keys_dir))
    made_with(pseudonyms, (path.parent / values.manifest).parent)
    return opted_out(path.parent / values.opt_out, pseudonyms)
