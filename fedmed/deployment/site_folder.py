"""A hospital's folder: site.toml, its keys, what its coordinator sent, and what Flower keeps there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedmed.deployment import node_keys
from fedmed.deployment.cards import SiteCard, write_card
from fedmed.deployment.certificates import AUTHORITY
from fedmed.deployment.files import write_new
from fedmed.deployment.kits import CONTENT, Kit, read_kit
from fedmed.durable import make_private, write_atomically, write_json
from fedmed.errors import ConfigError
from fedmed.federated.site_config import PEERS, SiteConfig, read_site_config
from fedmed.privacy import keys as site_keys
from fedmed.privacy.policy import SitePolicy

FILE, CARD, WITNESS = "site.toml", "card.json", "witness"
LEFT_OUT = ("required",)  # of policy.privacy: not to write it has a meaning of its own
HEAD = """\
# This hospital, as fedmed reads it. The file never leaves this machine, and no server can override it.
# Every key is here; the values that are not yours to fill in are the defaults. Paths are relative to this file.
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
    """Write a commented site.toml into a folder that only its owner enters, and make the folder of its witness.

    The witness lies outside `state`: who removes that, or puts an older copy there, gets no budget back.

    Raises:
        ConfigError: there is one, or a value is wrong.
    """
    make_private(folder)
    path = folder / FILE
    write_new(path, _written(name=name, manifest=manifest, cache_dir="cache", witness=WITNESS).encode())
    try:
        read_site_folder(path)
    except ConfigError:
        path.unlink()
        raise
    make_private(folder / WITNESS)
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
        ConfigError: there is no kit, or it is for another site or key, of another coordinator, older than the last, or
            was changed; or the fingerprint is none.
    """
    if not (folder / CONTENT).exists():
        raise ConfigError(f"{folder}: no {CONTENT} is there; a kit is the folder that the coordinator sent, kits/NAME")
    kit = read_kit(folder)
    if kit.site != site.config.name:
        raise ConfigError(f'the kit is for the site "{kit.site}"; this is "{site.config.name}"')
    if kit.node_key != node_keys.public_text(node_keys.read_node_key(site.keys).public_key()):
        raise ConfigError("the kit is for another key of this site; send the coordinator the newest card.json")
    known = _known_kit(site)
    if fingerprint is not None and node_keys.digits_of(fingerprint) != node_keys.digits_of(kit.fingerprint):
        raise ConfigError(f"the kit was not signed by {fingerprint}; do not use it, and tell the coordinator")
    if fingerprint is None and known is None:
        raise ConfigError(
            "who signed the kit? Ask the coordinator by telephone for the fingerprint of their key, and give what you "
            "hear as --coordinator"
        )
    if fingerprint is None and known is not None and known.coordinator != kit.coordinator:
        raise ConfigError(
            "the kit was signed by another key than before; ask the coordinator by telephone for the fingerprint of "
            "theirs, and give what you hear as --coordinator"
        )
    if known is not None and known.coordinator == kit.coordinator and kit.made < known.made:
        raise ConfigError(
            f"the kit was made on {kit.made:%Y-%m-%d %H:%M}, before the one that this site joined with "
            f"({known.made:%Y-%m-%d %H:%M}); ask the coordinator for the newest. If its clock was wrong then, delete "
            f"{site.kit} and join again"
        )
    make_private(site.kit)
    write_atomically(site.kit / AUTHORITY, kit.certificate)
    write_json(site.kit / CONTENT, kit.content)
    write_json(site.root / PEERS, dict(kit.sites))
    return read_kit(site.kit)


def _known_kit(site: SiteFolder) -> Kit | None:
    """The kit that the site has joined with; None if with none, or if what is there is damaged."""
    try:
        return read_kit(site.kit)
    except ConfigError:
        return None


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


def _written(**given: str) -> str:
    """A site.toml with every key at its default, or as given."""
    policy = SiteConfig.model_fields["policy"]
    table = "\n".join([_comment(policy), *_tables("policy", SitePolicy, given)])
    return "\n".join([HEAD, *(f"{entry}\n" for entry in _entries(SiteConfig, given)), table]) + "\n"


def _tables(name: str, section: type[BaseModel], given: Mapping[str, str]) -> Iterator[str]:
    """A section as TOML; tables come after values."""
    yield f"[{name}]"
    yield from _entries(section, given)
    for key, info in section.model_fields.items():
        inner = _table(info)
        if inner is not None:
            yield ""
            yield from _tables(f"{name}.{info.alias or key}", inner, given)


def _entries(section: type[BaseModel], given: Mapping[str, str]) -> Iterator[str]:
    """Every key that is no table, under what it means."""
    for key, info in section.model_fields.items():
        if _table(info) is None:
            value = given.get(key, list(info.default) if isinstance(info.default, tuple) else info.default)
            unsaid = "# " if key in LEFT_OUT else ""
            yield f"{_comment(info)}\n{unsaid}{info.alias or key} = {json.dumps(value)}"


def _comment(info: FieldInfo) -> str:
    text = str(info.description)
    return f"# {text[0].upper() if text[0].isascii() else text[0]}{text[1:]}."


def _table(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a key stands for, if it is no plain value."""
    kinds = (info.annotation, *get_args(info.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
