"""Coordinators at other machines: each has a certificate of the consortium, and stands on the server's list."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

from cryptography import x509

from fedmed.config import checked_name
from fedmed.deployment.certificates import AUTHORITY, make_coordinator_certificate, read_certificate
from fedmed.deployment.consortium import ServerFolder, joined, read_consortium
from fedmed.deployment.files import SECRET, read_json
from fedmed.deployment.kits import ADDRESS
from fedmed.durable import make_private, open_to_others, write_atomically, write_json
from fedmed.errors import ConfigError

KEY, CERTIFICATE, CONTENT = "coordinator.key", "coordinator.crt", "server.json"


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """How a coordinator reaches the server: from its own machine, or from another with a certificate."""

    address: str  # HOST:PORT
    authority: Path  # certificate, PEM
    certificate: Path | None = None  # of the coordinator, with its key beside it
    runs: Path | None = None  # where run folders lie, on the server's own machine

    @property
    def near(self) -> bool:
        """Whether this is the server's own machine."""
        return self.runs is not None

    @property
    def unanswered(self) -> str:
        """What to do when the server does not answer."""
        do = "fedmed server start" if self.near else "its coordinator has to start it, or a firewall is in between"
        return f"the server at {self.address} does not answer; {do}"

    def refused(self, status: int) -> str:
        """What to do when the server answers with an error, by its HTTP status."""
        if self.near or status != HTTPStatus.FORBIDDEN:
            return f"the server refused ({status}); its log says why"
        return (
            f"the server refused ({status}): this certificate is not on its list: it was renewed, or taken off; at "
            "the server, fedmed server coordinator NAME makes a new folder"
        )

    def tls(self) -> ssl.SSLContext:
        """What a connection needs.

        Raises:
            ConfigError: a file is missing or damaged, or others may read the coordinator's key.
        """
        try:
            context = ssl.create_default_context(cafile=str(self.authority))
            if self.certificate is not None:
                key = self.certificate.with_name(KEY)
                if open_to_others(key):
                    raise ConfigError(f"{key} can be read by others on this machine; chmod 600 it")
                ended = read_certificate(self.certificate).not_valid_after_utc
                if ended < datetime.now(UTC):
                    raise ConfigError(
                        f"this coordinator's certificate ended on {ended:%Y-%m-%d}; at the server, fedmed server "
                        "coordinator NAME makes a new folder"
                    )
                context.load_cert_chain(self.certificate, key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"the coordinator's key or a certificate cannot be read ({error.strerror})") from None
        return context


def entrance(path: Path) -> Entrance:
    """The way in that a folder describes: the server's own, or that of a coordinator at another machine.

    Raises:
        ConfigError: it is neither, or something in it is wrong.
    """
    if not (path / CONTENT).exists():
        return own_entrance(read_consortium(path))
    address = read_json(path / CONTENT, "coordinator's folder").get("address")
    if not isinstance(address, str) or not ADDRESS.fullmatch(address):
        raise ConfigError(f"{path / CONTENT}: address: expected HOST:PORT")
    return Entrance(address=address, authority=path / AUTHORITY, certificate=path / CERTIFICATE)


def own_entrance(folder: ServerFolder) -> Entrance:
    """The way in on the server's own machine, past nginx."""
    consortium = folder.consortium
    address = joined(consortium.reached, consortium.inside[1])
    return Entrance(address=address, authority=folder.tls / AUTHORITY, runs=folder.runs)


def admit_coordinator(folder: ServerFolder, name: str, request: Path | None) -> Path:
    """Put a coordinator on the server's list, and make the folder to give to it. A newer certificate replaces an older.

    Args:
        folder: of the server.
        name: of the coordinator.
        request: a signing request, if the coordinator made its key itself; else the key is made here.

    Returns:
        The folder: certificate, authority, address, and the key if it was made here.

    Raises:
        ConfigError: nothing is provisioned, no nginx is meant to stand in front, or the request is none.
    """
    try:
        checked_name(name)
        if name.endswith((".crt", ".key")):  # its folder would be taken for a certificate on the list
            raise ConfigError(f'a coordinator cannot be called "{name}", as a certificate is; leave out the ending')
        asked = request.read_bytes() if request is not None else None
    except ValueError:
        raise ConfigError(f'a coordinator cannot be called "{name}": letters, digits, blanks and _ . - only') from None
    except OSError as error:
        raise ConfigError(f"{request}: cannot be read ({error.strerror})") from None
    if not folder.consortium.loopback_port:
        raise ConfigError("loopback-port in consortium.toml is 0: coordinators elsewhere need nginx in front")
    certificate, key = make_coordinator_certificate(folder.tls, name, folder.consortium.certificate_days, asked)
    given = make_private(make_private(folder.coordinators) / name)
    if key is not None:
        write_atomically(given / KEY, key, mode=SECRET)
    write_atomically(given / CERTIFICATE, certificate)
    write_atomically(given / AUTHORITY, (folder.tls / AUTHORITY).read_bytes())
    write_json(given / CONTENT, {"address": folder.consortium.address})
    write_atomically(folder.coordinators / f"{name}.crt", certificate)
    if key is None:
        (given / KEY).unlink(missing_ok=True)  # of an older certificate
    return given


def coordinators(folder: ServerFolder) -> tuple[dict[str, x509.Certificate], list[str]]:
    """The certificates on the server's list, by the coordinator's name, and what there is to say of damaged ones.

    A damaged one opens nothing, and does not keep others from being taken off the list.
    """
    found, damaged = {}, []
    for path in sorted(folder.coordinators.glob("*.crt")):
        try:
            found[path.stem] = read_certificate(path)
        except ConfigError as error:
            damaged.append(f"{path.stem} is shut out: {error}")
    return found, damaged
