"""What a coordinator makes before the server starts: authority, certificate, the list of sites, and a kit for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

import fedmed
from fedmed.deployment import certificates
from fedmed.deployment.cards import SiteCard, read_card
from fedmed.deployment.consortium import ServerFolder
from fedmed.deployment.control import NEW_KEY, control, taken_out
from fedmed.deployment.coordinators import own_entrance
from fedmed.deployment.flower_app import app_hash
from fedmed.deployment.kits import Kit, coordinator_key, write_kit
from fedmed.deployment.proxy import write_nginx
from fedmed.durable import make_private, write_atomically
from fedmed.errors import ConfigError, FedmedError


@dataclass(frozen=True, kw_only=True)
class Provisioned:
    """What there is now."""

    certificate: x509.Certificate
    renewed: bool  # whether the certificate is new
    cards: tuple[SiteCard, ...]
    kits: tuple[Kit, ...]  # in the order of the cards
    damaged: tuple[str, ...] = ()  # what is wrong with the cards of further sites, which keep their kits


def readable_cards(folder: ServerFolder) -> tuple[list[SiteCard], dict[str, str]]:
    """The cards of the sites that may connect, and, by the site's name, what is wrong with those that are damaged."""
    cards, wrong = [], {}
    for path in sorted(folder.cards.glob("*.json")):
        try:
            cards.append(read_card(path))
        except ConfigError as error:
            wrong[path.stem] = f"{error}; until then nothing changes for that site, but new kits do not name it"
    return cards, wrong


def provision(folder: ServerFolder, cards: Sequence[Path], *, renew: bool = False) -> Provisioned:
    """Make what is missing, take in cards, and write every site's kit anew.

    Nothing is written before all cards are read. A site's newer card replaces its older one. A damaged
    one that is there already holds up nobody else; no new kit names its site.

    Args:
        folder: of the server.
        cards: of sites that are new, or come back.
        renew: whether to make the server's certificate anew, though it is good for longer.

    Raises:
        ConfigError: a new card is damaged, of another fedmed, or has a key that was taken out before, or two sites
            share a name or a key.
    """
    found = [read_card(path) for path in cards]
    everyone = {card.name: card for card in [*readable_cards(folder)[0], *found]}
    if len({card.name for card in found}) < len(found):
        raise ConfigError("two of the cards have the same name; sites of a consortium are told apart by it")
    if len({card.node_text for card in everyone.values()}) < len(everyone):
        raise ConfigError("two sites have the same key; one of them copied the other's folder and needs its own keygen")
    if gone := _taken_out(folder, found):
        raise ConfigError(f"{gone[0]}: {NEW_KEY}, and send its new card")
    for card in found:
        if card.fedmed != fedmed.__version__:
            raise ConfigError(
                f"{card.name} has fedmed {card.fedmed}, this server {fedmed.__version__}; they have to be the same"
            )
    certificate, renewed = server_certificate(folder, renew=renew)
    key, app = coordinator_key(folder.coordinator), app_hash()
    authority = (folder.tls / certificates.AUTHORITY).read_bytes()
    make_private(folder.cards)
    for path, card in zip(cards, found, strict=True):
        target = folder.cards / f"{card.name}.json"
        if path.absolute() != target.absolute():
            write_atomically(target, path.read_bytes())  # a server that runs looks every two seconds
    everybody, damaged = readable_cards(folder)
    write_nginx(folder)
    kits = tuple(
        write_kit(
            make_private(folder.kits) / card.name,
            card,
            key,
            consortium=folder.consortium.name,
            address=folder.consortium.address,
            apps=[app],
            ca=authority,
            sites={each.name: each.signing_key.hex() for each in everybody},
        )
        for card in everybody
    )
    return Provisioned(
        certificate=certificate, renewed=renewed, cards=tuple(everybody), kits=kits, damaged=tuple(damaged.values())
    )


def _taken_out(folder: ServerFolder, cards: Sequence[SiteCard]) -> list[str]:
    """The sites whose keys a server that runs has taken out; one that does not says so when it is started."""
    if not cards or not (folder.tls / certificates.AUTHORITY).exists():
        return []
    try:
        with control(own_entrance(folder)) as client:
            return taken_out(client, cards)
    except FedmedError:
        return []


def server_certificate(folder: ServerFolder, *, renew: bool = False) -> tuple[x509.Certificate, bool]:
    """The server's certificate, and whether it is new: missing, near its end, or for other addresses or keys before.

    Args:
        folder: of the server.
        renew: whether to make a new one in any case.

    Raises:
        ConfigError: the authority cannot be used.
    """
    make_private(folder.tls)
    if not (folder.tls / certificates.AUTHORITY).exists():
        certificates.make_authority(folder.tls, folder.consortium.name)
    names, now = folder.consortium.names, datetime.now(UTC)
    if (folder.tls / certificates.SERVER).exists() and not renew:
        there = certificates.read_certificate(folder.tls / certificates.SERVER)
        authority = certificates.read_certificate(folder.tls / certificates.AUTHORITY)
        fits = certificates.stands_for(there, names)
        fits = fits and certificates.belong_together(there, folder.tls / certificates.SERVER_KEY)
        if fits and not certificates.problem(there, authority, now) and not certificates.ends_soon(there, now):
            return there, False
    return certificates.make_server_certificate(folder.tls, names, folder.consortium.certificate_days), True
