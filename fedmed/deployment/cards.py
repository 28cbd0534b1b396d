"""A site's card: what its coordinator has to know of it before it connects. Public keys, nothing of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

import fedmed
from fedmed.config import checked_name
from fedmed.deployment import node_keys
from fedmed.deployment.files import read_json
from fedmed.durable import write_json
from fedmed.errors import ConfigError
from fedmed.federated.identity import package_hash
from fedmed.privacy import keys as site_keys
from fedmed.privacy.chain import canonical

KEYS = {"schema", "kind", "name", "fedmed", "code", "node-key", "signing-key", "signatures"}
KIND = "fedmed site card"


@dataclass(frozen=True, kw_only=True)
class SiteCard:
    """A card whose signatures were checked."""

    name: str
    fedmed: str  # version
    code: str  # SHA-256 of the installed package
    node_key: ec.EllipticCurvePublicKey
    signing_key: bytes

    @property
    def fingerprint(self) -> str:
        """What the site's own people read out when they are asked whether this card is theirs."""
        return node_keys.fingerprint(canonical({"node": self.node_text, "signing": self.signing_key.hex()}).encode())

    @property
    def node_text(self) -> str:
        """The node key as one line."""
        return node_keys.public_text(self.node_key)


def write_card(path: Path, name: str, keys: Path) -> SiteCard:
    """Write a site's card, signed with both of its keys: whoever has the card has neither.

    Args:
        path: of the card.
        name: of the site.
        keys: the folder of its keys.

    Raises:
        ConfigError, LedgerUnusable: a key cannot be read.
    """
    node, signing = node_keys.read_node_key(keys), site_keys.read_keys(keys)
    values: dict[str, Any] = {
        "schema": 1,
        "kind": KIND,
        "name": name,
        "fedmed": fedmed.__version__,
        "code": package_hash(),
        "node-key": node_keys.public_text(node.public_key()),
        "signing-key": signing.public.hex(),
    }
    message = canonical(values).encode()
    values["signatures"] = {"node": node_keys.sign(node, message).hex(), "signing": signing.sign(message).hex()}
    write_json(path, values)
    return read_card(path)


def read_card(path: Path) -> SiteCard:
    """Read a card and check that the owner of both keys made it.

    Raises:
        ConfigError: it is no card, or was changed.
    """
    values = read_json(path, "site card")
    if set(values) != KEYS or values["kind"] != KIND or values["schema"] != 1:
        raise ConfigError(f"{path}: this is no site card of this version; fedmed site keygen writes one")
    try:
        name = checked_name(values["name"])
        signing = bytes.fromhex(values["signing-key"])
        node = node_keys.read_public_text(str(values["node-key"]))
        signatures = {who: bytes.fromhex(values["signatures"][who]) for who in ("node", "signing")}
    except (ConfigError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{path}: the site card is damaged; ask the site for it again") from None
    message = canonical(_unsigned(values)).encode()
    whole = node_keys.signed_by(node, message, signatures["node"])
    if not (whole and site_keys.signed_by(signing, message, signatures["signing"])):
        raise ConfigError(f"{path}: the site card was changed since it was signed; ask the site for it again")
    return SiteCard(
        name=name, fedmed=str(values["fedmed"]), code=str(values["code"]), node_key=node, signing_key=signing
    )


def _unsigned(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "signatures"}
