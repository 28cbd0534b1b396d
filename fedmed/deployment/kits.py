"""A site's kit: what a hospital needs to connect. The coordinator signs it, and each kit is for one site only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedmed
from fedmed.config import checked_name
from fedmed.deployment.cards import SiteCard
from fedmed.deployment.certificates import AUTHORITY, parse_certificate
from fedmed.deployment.files import SECRET, read_json, write_new
from fedmed.deployment.node_keys import fingerprint
from fedmed.durable import DIGEST, make_private, write_atomically, write_json
from fedmed.errors import ConfigError
from fedmed.privacy.chain import canonical
from fedmed.privacy.keys import signed_by

KEYS = {"schema", "kind", "consortium", "site", "node-key", "address", "apps", "authority", "fedmed", "made", "sites"}
KIND = "fedmed site kit"
CONTENT, SIGNING = "kit.json", "signing.key"
ADDRESS = re.compile(r"(\[[0-9a-f:]+\]|[a-z0-9.-]+):\d{1,5}")


@dataclass(frozen=True, kw_only=True)
class Kit:
    """A kit whose signature was checked."""

    consortium: str
    site: str
    node_key: str  # of the site that it is for, one line
    address: str  # HOST:PORT of the server
    apps: tuple[str, ...]  # SHA-256 of the apps that runs may bring
    coordinator: bytes  # public key
    certificate: bytes  # of the authority, PEM
    sites: Mapping[str, str]  # name and public signing key of every site of the consortium, hexadecimal
    fedmed: str  # version that the coordinator has
    made: datetime
    content: Mapping[str, Any] = field(repr=False)  # of the file, as it was signed

    @property
    def fingerprint(self) -> str:
        """Of the coordinator's key, to be compared by telephone."""
        return fingerprint(self.coordinator)


def coordinator_key(folder: Path) -> Ed25519PrivateKey:
    """The key that signs kits, made when it is first needed.

    Raises:
        ConfigError: it is damaged.
    """
    path = make_private(folder) / SIGNING
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        write_new(path, key.private_bytes_raw().hex().encode() + b"\n", SECRET)
        return key
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="ascii")))
    except ValueError:
        raise ConfigError(f"{path}: the coordinator's key is damaged; restore it from your safe") from None


def write_kit(
    folder: Path,
    card: SiteCard,
    key: Ed25519PrivateKey,
    *,
    consortium: str,
    address: str,
    apps: Sequence[str],
    ca: bytes,
    sites: Mapping[str, str],
) -> Kit:
    """Write a site's kit in the place of an older one.

    Args:
        folder: to send to the site.
        card: of the site.
        key: of the coordinator.
        consortium: its name.
        address: HOST:PORT of the server.
        apps: SHA-256 of the apps that runs may bring.
        ca: the authority's certificate, PEM.
        sites: name and public signing key of every site, hexadecimal.
    """
    make_private(folder)
    values: dict[str, Any] = {
        "schema": 1,
        "kind": KIND,
        "consortium": consortium,
        "site": card.name,
        "node-key": card.node_text,
        "address": address,
        "apps": list(apps),
        "sites": dict(sorted(sites.items())),
        "authority": hashlib.sha256(ca).hexdigest(),
        "fedmed": fedmed.__version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    signature = key.sign(canonical(values).encode()).hex()
    public = key.public_key().public_bytes_raw().hex()
    write_atomically(folder / AUTHORITY, ca)
    write_json(folder / CONTENT, {**values, "coordinator": public, "signature": signature})
    return read_kit(folder)


def read_kit(folder: Path) -> Kit:
    """Read a kit and check its signature. Whose key that is, only the fingerprint says.

    Raises:
        ConfigError: it is no kit, or was changed.
    """
    values = read_json(folder / CONTENT, "site kit")
    if set(values) != KEYS | {"coordinator", "signature"} or values["kind"] != KIND or values["schema"] != 1:
        raise ConfigError(f"{folder}: this is no site kit of this version; ask the coordinator for a new one")
    try:
        certificate = (folder / AUTHORITY).read_bytes()
        public, signature = bytes.fromhex(values["coordinator"]), bytes.fromhex(values["signature"])
        names = [checked_name(values[key]) for key in ("consortium", "site")]
        sound = bool(ADDRESS.fullmatch(values["address"])) and all(map(DIGEST.fullmatch, values["apps"]))
        others = {str(name): str(key) for name, key in values["sites"].items()}
        sound = sound and all(map(DIGEST.fullmatch, others.values()))
        made = datetime.fromisoformat(values["made"])
        sound = sound and made.tzinfo is not None
    except (OSError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"{folder}: the site kit is damaged; ask the coordinator for it again") from None
    signed = {key: values[key] for key in KEYS}
    same = hashlib.sha256(certificate).hexdigest() == values["authority"]
    if not (sound and same and signed_by(public, canonical(signed).encode(), signature)):
        raise ConfigError(f"{folder}: the site kit was changed since it was signed; ask the coordinator for it again")
    parse_certificate(certificate)
    return Kit(
        consortium=names[0],
        site=names[1],
        node_key=str(values["node-key"]),
        address=values["address"],
        apps=tuple(values["apps"]),
        coordinator=public,
        certificate=certificate,
        sites=MappingProxyType(others),
        fedmed=str(values["fedmed"]),
        made=made,
        content=MappingProxyType(values),
    )
