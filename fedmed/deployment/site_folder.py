"""A hospital's folder: site.toml, its keys, what its coordinator sent, and what Flower keeps there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedmed.deployment import node_keys
from fedmed.deployment.cards import SiteCard, write_card
from fedmed.deployment.files import make_folder, write_json, write_new
from fedmed.deployment.kits import CERTIFICATE, CONTENT, Kit, read_kit
from fedmed.errors import ConfigError
from fedmed.federated.site_config import SiteConfig, read_site_config
from fedmed.privacy import keys as site_keys
from fedmed.privacy.policy import SitePolicy

FILE, CARD = "site.toml", "card.json"
HEAD = """\
# This hospital, as fedmed reads it. The file never leaves this machine, and no server can override it.
# Every key is here; the values that are not yours to fill in are the defaults. Paths are relative to this file.

# The site's name in the federation.
name = {name}

# The CSV of images: patient_id, image, and mask or one column per label.
manifest = {manifest}

# A CSV of patients who withdrew, by id or pseudonym. It is read anew for every task, and nobody in it takes part.
opt-out = ""

# "module:function" for data that are no images.
dataset = ""

# Where decoded images are kept; empty = memory only.
cache-dir = "cache"

# Size of that in GiB.
cache-gib = 50.0

# What the site keeps between rounds, and its ledger, audit log and egress manifest. Back it up.
state-dir = "state"

# Where it trains: "cpu", "cuda", or "cuda:1".
device = "cpu"

# In which form evaluations of its patients may leave: "histogram" or "none".
metrics = "histogram"

# Networks of the form "module:function" that a server may ask this site to import.
networks = []

# The site's keys. Never in the ledger's folder.
keys-dir = "keys"

# Memory in GiB that each process of a task may have for itself; 0 = no limit. fedmed site check says what it needs.
task-memory-gib = 0.0

# Processors that a task may use; 0 = all.
task-cpus = 0

# Seconds in which a task neither computes nor reads, after which it is ended; 0 = only at its round's deadline.
task-stalls-after-s = 600.0

# SHA-256 of the apps that runs may bring; empty = all that the kit names.
approved-apps = []

# Port of 127.0.0.1 that answers GET /health; 0 = none.
health-port = 0

# Where the runner's log goes: "file" (logs/site.log), "syslog" or "journal".
log-to = "file"

# What this hospital allows. With this table it keeps a ledger, an audit log and an egress manifest.
"""


@dataclass(frozen=True, kw_only=True)
class SiteFolder:
    """Where things lie beside a site.toml."""

    file: Path
    config: SiteConfig

    @property
    def root(self) -> Path:
        """The folder."""
        return self.file.parent

    @property
    def keys(self) -> Path:
        """The site's keys."""
        return self.root / self.config.keys_dir

    @property
    def state(self) -> Path:
        """What it keeps between rounds, and its records."""
        return self.root / (self.config.state_dir or "state")

    @property
    def kit(self) -> Path:
        """The kit that was joined."""
        return self.root / "consortium"

    @property
    def flower(self) -> Path:
        """Flower's own files, and this runner's."""
        return self.root / "flower"

    @property
    def logs(self) -> Path:
        """What the SuperNode says."""
        return self.root / "logs"


def read_site_folder(path: Path) -> SiteFolder:
    """Read a site.toml, or the one in a folder.

    Raises:
        ConfigError: it is missing or wrong.
    """
    path = (path / FILE if path.is_dir() else path).absolute()
    return SiteFolder(file=path, config=read_site_config(path))


def init_site(folder: Path, *, name: str, manifest: str) -> Path:
    """Write a commented site.toml into a folder that only its owner enters.

    Raises:
        ConfigError: there is one, or a value is wrong.
    """
    make_folder(folder)
    path = folder / FILE
    head = HEAD.format(name=json.dumps(name), manifest=json.dumps(manifest))
    write_new(path, (head + "\n".join(_tables("policy", SitePolicy)) + "\n").encode())
    try:
        read_site_folder(path)
    except ConfigError:
        path.unlink()
        raise
    return path


def make_site_keys(site: SiteFolder) -> SiteCard:
    """Make what the site lacks of its keys, and write its card. Keys that are there stay.

    Raises:
        ConfigError, LedgerUnusable: a key is damaged, others may read it, or it cannot be written.
    """
    if not site.keys.exists():
        site_keys.make_keys(site.keys)
    if not (site.keys / node_keys.PRIVATE).exists():
        node_keys.make_node_key(site.keys)
    return write_card(site.root / CARD, site.config.name, site.keys)


def join(site: SiteFolder, folder: Path, fingerprint: str | None) -> Kit:
    """Check a kit and install it.

    Args:
        site: that joins.
        folder: of the kit.
        fingerprint: of the coordinator's key, heard from the coordinator by another way than the kit came. May be
            None when a kit of the same coordinator is there already.

    Raises:
        ConfigError: the kit is for another site or key, of another coordinator, or was changed.
    """
    kit = read_kit(folder)
    if kit.site != site.config.name:
        raise ConfigError(f'the kit is for the site "{kit.site}"; this is "{site.config.name}"')
    if kit.node_key != node_keys.public_text(node_keys.read_node_key(site.keys).public_key()):
        raise ConfigError("the kit is for another key of this site; send the coordinator the newest card.json")
    known = read_kit(site.kit).coordinator if (site.kit / CONTENT).exists() else None
    if fingerprint is not None and fingerprint.strip().lower() != kit.fingerprint:
        raise ConfigError(
            f"the kit was signed by {kit.fingerprint}, not by {fingerprint}; do not use it, and tell the coordinator"
        )
    if fingerprint is None and known is None:
        raise ConfigError(
            f"the kit was signed by {kit.fingerprint}; ask the coordinator by telephone, then give it as --coordinator"
        )
    if fingerprint is None and known != kit.coordinator:
        raise ConfigError(
            f"the kit was signed by {kit.fingerprint}, another key than before; ask the coordinator by telephone, "
            "then give it as --coordinator"
        )
    make_folder(site.kit)
    content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
    (site.kit / CERTIFICATE).unlink(missing_ok=True)
    write_new(site.kit / CERTIFICATE, kit.certificate)
    write_json(site.kit / CONTENT, content)
    return read_kit(site.kit)


def joined_kit(site: SiteFolder) -> Kit:
    """The kit that the site has joined with.

    Raises:
        ConfigError: none, or it does not fit the site any more.
    """
    if not (site.kit / CONTENT).exists():
        raise ConfigError("this site has joined no consortium; fedmed site join KIT")
    kit = read_kit(site.kit)
    key = node_keys.public_text(node_keys.read_node_key(site.keys).public_key())
    if (kit.site, kit.node_key) != (site.config.name, key):
        raise ConfigError("the site's name or key changed since it joined; send the coordinator the newest card.json")
    return kit


def _tables(name: str, section: type[BaseModel]) -> Iterator[str]:
    """A section as TOML at its defaults, each key under what it means; tables come after values."""
    yield f"[{name}]"
    for key, info in section.model_fields.items():
        if _table(info) is not None:
            continue
        text = str(info.description)
        yield f"# {text[0].upper() if text[0].isascii() else text[0]}{text[1:]}."
        default = list(info.default) if isinstance(info.default, tuple) else info.default
        yield f"{info.alias or key} = {json.dumps(default)}"
    for key, info in section.model_fields.items():
        inner = _table(info)
        if inner is not None:
            yield ""
            yield from _tables(f"{name}.{info.alias or key}", inner)


def _table(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a key stands for, if it is no plain value."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
