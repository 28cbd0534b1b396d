"""`fedmed site check`: everything that taking part needs, looked at one by one."""

from __future__ import annotations

import email.utils
import http.client
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import fedmed
from fedmed.deployment import certificates, node_keys
from fedmed.deployment.kits import CERTIFICATE, Kit
from fedmed.deployment.site_folder import SiteFolder, joined_kit, read_site_folder
from fedmed.errors import ConfigError, DataError, FedmedError
from fedmed.privacy import keys as site_keys
from fedmed.privacy.verification import examine

CONNECT_S = 10.0
CLOCK_S = 60.0  # Flower refuses requests from five minutes off on
DISK_GIB = 5.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the page: what was looked at, whether it is well, and what was found or what to do."""

    what: str
    ok: bool
    said: str


def check_site(path: Path) -> Iterator[Finding]:
    """Look at everything; what needs a thing that is missing is not looked at."""
    try:
        site = read_site_folder(path)
    except FedmedError as error:
        yield Finding(what="site.toml", ok=False, said=str(error))
        return
    yield Finding(what="site.toml", ok=True, said=site.config.name)
    yield _look("versions", versions)
    yield _look("keys", lambda: keys(site))
    yield _look("manifest", lambda: manifest(site))
    yield _look("ledger", lambda: ledger(site))
    yield _look("disk", lambda: disk(site))
    try:
        kit = joined_kit(site)
    except FedmedError as error:
        yield Finding(what="kit", ok=False, said=str(error))
        return
    yield Finding(what="kit", ok=True, said=f"{kit.consortium} at {kit.address}, signed by {kit.fingerprint}")
    yield _look("authority", lambda: authority(kit))
    reached = _look("port", lambda: port(kit))
    yield reached
    if reached.ok:
        yield _look("certificate", lambda: certificate(site, kit))
        yield _look("clock", lambda: clock(site, kit))


def _look(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, ok=True, said=look())
    except FedmedError as error:
        return Finding(what=what, ok=False, said=str(error))


def versions() -> str:
    """Whether the installed packages are those that fedmed was made for.

    Raises:
        ConfigError: one is missing or of another version.
    """
    for line in requires("fedmed") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(need.name)
        except PackageNotFoundError:
            raise ConfigError(f"{need.name} is not installed; install fedmed again") from None
        if not need.specifier.contains(there, prereleases=True):
            raise ConfigError(f"{need.name} is {there}, fedmed needs {need.specifier}; install fedmed again")
    return f"fedmed {fedmed.__version__}, flwr {version('flwr')}, torch {version('torch')}"


def keys(site: SiteFolder) -> str:
    """Whether all keys are there, whole, and the owner's alone.

    Raises:
        ConfigError, LedgerUnusable: one is not.
    """
    node_keys.read_node_key(site.keys)
    site_keys.read_keys(site.keys)
    return "there, and read by their owner only"


def manifest(site: SiteFolder) -> str:
    """Whether the manifest can be read; what its images hold says `fedmed data check`.

    Raises:
        DataError: it cannot.
    """
    if site.config.dataset:
        return f"the site reads its data with {site.config.dataset}; not looked at"
    path = site.root / site.config.manifest
    try:
        with path.open(encoding="utf-8-sig") as file:
            columns = [column.strip() for column in file.readline().split(",")]
            rows = sum(1 for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the manifest cannot be read ({type(error).__name__}); see site.toml, manifest") from None
    missing = [column for column in ("patient_id", "image") if column not in columns]
    if missing:
        raise DataError(f"the manifest has no column {missing[0]}; its first line names the columns")
    if not rows:
        raise DataError("the manifest has no rows")
    return f"{rows} rows; fedmed data check looks at the images"


def ledger(site: SiteFolder) -> str:
    """Whether the ledger is whole, and what is spent.

    Raises:
        ConfigError: it has faults.
        LedgerUnusable: it cannot be read.
    """
    if site.config.policy is None:
        return "none: site.toml has no [policy]"
    state = site.root / (site.config.state_dir or "state")
    if not (state / "ledger").exists():
        return f"none yet; ε up to {site.config.policy.privacy.epsilon:g} may be spent"
    found = examine(state, site_keys.read_public(site.keys / site_keys.PUBLIC), anchors=[], witnesses=[])
    if found.faults:
        raise ConfigError(f"{len(found.faults)} faults; fedmed ledger verify names them. Do not train until then")
    return f"whole; ε = {found.spent.epsilon:.3f} of {site.config.policy.privacy.epsilon:g} is spent"


def disk(site: SiteFolder) -> str:
    """Whether there is room for state, logs and records.

    Raises:
        ConfigError: less than 5 GiB.
    """
    free = shutil.disk_usage(site.root).free / 2**30
    if free < DISK_GIB:
        raise ConfigError(f"{free:.1f} GiB free, {DISK_GIB:g} are needed; make room, or move state-dir")
    return f"{free:.0f} GiB free"


def authority(kit: Kit) -> str:
    """Until when the consortium's authority is valid.

    Raises:
        ConfigError: it is not, or not for long.
    """
    found, now = certificates.parse_certificate(kit.certificate), datetime.now(UTC)
    wrong = certificates.problem(found, found, now)
    if wrong or certificates.ends_soon(found, now):
        raise ConfigError(f"{wrong or 'it ends soon'}; ask the coordinator for a new kit")
    return f"valid until {found.not_valid_after_utc:%Y-%m-%d}"


def port(kit: Kit) -> str:
    """Whether the server's port can be reached from here.

    Raises:
        ConfigError: it cannot.
    """
    try:
        with socket.create_connection(_place(kit), timeout=CONNECT_S):
            return f"{kit.address} can be reached"
    except OSError as error:
        raise ConfigError(
            f"{kit.address} cannot be reached ({error.strerror or type(error).__name__}); the firewall has to let TCP "
            "out to it, and the server has to run"
        ) from None


def certificate(site: SiteFolder, kit: Kit) -> str:
    """Whether the server shows a certificate of the consortium, for its name, for long enough.

    Raises:
        ConfigError: it does not; the server may be another than it says, or something stands between.
    """
    host, number = _place(kit)
    trusted = ssl.create_default_context(cafile=str(site.kit / CERTIFICATE))
    try:
        with (
            socket.create_connection((host, number), timeout=CONNECT_S) as plain,
            trusted.wrap_socket(plain, server_hostname=host) as secure,
        ):
            shown, protocol = secure.getpeercert(binary_form=True) or b"", secure.version()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the server's certificate is refused ({error.verify_message}); is a proxy between? Tell the coordinator"
        ) from None
    except OSError as error:
        raise ConfigError(f"no TLS with {kit.address} ({type(error).__name__}); tell the coordinator") from None
    found = certificates.parse_certificate(ssl.DER_cert_to_PEM_cert(shown).encode())
    if certificates.ends_soon(found, datetime.now(UTC)):
        raise ConfigError(
            f"the server's certificate ends on {found.not_valid_after_utc:%Y-%m-%d}; tell the coordinator"
        )
    return f"{protocol}, valid until {found.not_valid_after_utc:%Y-%m-%d}"


def clock(site: SiteFolder, kit: Kit) -> str:
    """How far this machine's clock is from the server's.

    Raises:
        ConfigError: more than a minute.
    """
    host, number = _place(kit)
    trusted = ssl.create_default_context(cafile=str(site.kit / CERTIFICATE))
    try:
        connection = http.client.HTTPSConnection(host, number, timeout=CONNECT_S, context=trusted)
        connection.request("GET", "/")
        said = connection.getresponse().getheader("date") or ""
        connection.close()
        theirs = email.utils.parsedate_to_datetime(said)
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        raise ConfigError("the server does not tell its time; see the lines above") from None
    off_s = (datetime.now(UTC) - theirs).total_seconds()
    if abs(off_s) > CLOCK_S:
        raise ConfigError(f"{off_s:+.0f} s from the server's clock; set up time synchronisation (NTP) here or there")
    return f"{abs(off_s):.0f} s from the server's"


def _place(kit: Kit) -> tuple[str, int]:
    host, _, number = kit.address.rpartition(":")
    return host.strip("[]"), int(number)
