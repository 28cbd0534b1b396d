"""`consortium.toml`: what the coordinator says of the consortium's server; and where its files lie."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from fedmed.config import Name, Section, checked, read_toml
from fedmed.deployment.files import write_new
from fedmed.durable import make_private
from fedmed.errors import ConfigError

FILE = "consortium.toml"
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what listens there is reached on loopback
DNS = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
TEMPLATE = """\
# A consortium of hospitals, as its coordinator describes it. Read by every `fedmed server` command.

name = "{name}"

# DNS names and IP addresses at which sites reach this server. The certificate stands for all of them; kits name the
# first one.
addresses = ["{address}"]

# The one TCP port of the server.
port = {port}

# The address that the server listens on. Loopback lets nobody else in; "0.0.0.0" is every network of this machine.
listen = "127.0.0.1"

# With nginx in front, which coordinators at other machines need: the port of loopback on which the server itself then
# listens, while nginx listens on the address and port above. 0 = no nginx.
loopback-port = {loopback_port}

# Days that the certificates of the server and of coordinators are valid. `fedmed server provision` renews the server's
# in the last 30.
certificate-days = 365

# Where runs are kept, relative to this file.
runs = "runs"
"""


def _address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        if DNS.fullmatch(value):
            return value
        raise ValueError("expected DNS names in lower case, or IP addresses, without a port") from None


Address = Annotated[str, AfterValidator(_address)]


class Consortium(Section):
    """The file's keys."""

    name: Name
    addresses: Annotated[tuple[Address, ...], Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] = 8443
    listen: Address = "127.0.0.1"
    loopback_port: Annotated[int, Field(ge=0, le=65535)] = 0
    certificate_days: Annotated[int, Field(ge=1, le=825)] = 365
    runs: str = "runs"

    @model_validator(mode="after")
    def _ports_are_distinct(self) -> Consortium:
        if self.loopback_port == self.port:
            raise ValueError("loopback-port must not be port: nginx listens on port, the server on loopback-port")
        return self

    @property
    def address(self) -> str:
        """HOST:PORT that sites and coordinators connect to."""
        return joined(self.addresses[0], self.port)

    @property
    def reached(self) -> str:
        """The host at which this machine itself reaches the SuperLink; one of the names of the certificate."""
        return EVERYWHERE.get(self.inside[0], self.inside[0])

    @property
    def names(self) -> tuple[str, ...]:
        """What the server's certificate stands for."""
        return tuple(dict.fromkeys((*self.addresses, self.reached)))

    @property
    def inside(self) -> tuple[str, int]:
        """Where the SuperLink itself listens: behind nginx on loopback."""
        return ("127.0.0.1", self.loopback_port) if self.loopback_port else (self.listen, self.port)


def joined(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, kw_only=True)
class ServerFolder:
    """Where things lie beside a consortium.toml."""

    root: Path
    consortium: Consortium

    @property
    def tls(self) -> Path:
        """The authority's and the server's keys and certificates."""
        return self.root / "tls"

    @property
    def coordinator(self) -> Path:
        """The key that signs kits."""
        return self.root / "coordinator"

    @property
    def coordinators(self) -> Path:
        """The certificates of the coordinators at other machines, `NAME.crt`, and a folder for each."""
        return self.root / "coordinators"

    @property
    def nginx(self) -> Path:
        """The proxy's configuration and its own files."""
        return self.root / "nginx"

    @property
    def cards(self) -> Path:
        """The cards of the sites that may connect, `NAME.json`."""
        return self.root / "sites"

    @property
    def kits(self) -> Path:
        """One folder per site, to be sent to it."""
        return self.root / "kits"

    @property
    def flower(self) -> Path:
        """Flower's own files: its database and apps."""
        return self.root / "flower"

    @property
    def runs(self) -> Path:
        """Run folders."""
        return self.root / self.consortium.runs


def read_consortium(path: Path) -> ServerFolder:
    """Read a consortium.toml, or the one in a folder.

    Raises:
        ConfigError: it is missing or wrong.
    """
    path = (path / FILE if path.is_dir() else path).absolute()
    values = read_toml(path, missing="no such file; fedmed server init makes one")
    return ServerFolder(root=path.parent, consortium=checked(Consortium, values, source=str(path)))


def init_consortium(folder: Path, *, name: str, address: str, port: int, loopback_port: int = 0) -> Path:
    """Write a commented consortium.toml into a folder that only its owner enters.

    Raises:
        ConfigError: there is one, or a value is wrong.
    """
    make_private(folder)
    path = folder / FILE
    write_new(path, TEMPLATE.format(name=name, address=address, port=port, loopback_port=loopback_port).encode())
    try:
        read_consortium(path)
    except ConfigError as error:
        path.unlink()
        raise ConfigError(f"--name, --address or --port: {str(error).partition(': ')[2]}") from None
    return path
