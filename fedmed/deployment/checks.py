"""`fedmed site check`: everything that taking part needs, looked at one by one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import fedmed
from fedmed.deployment import certificates, node_keys, reach
from fedmed.deployment.flower_app import app_hash
from fedmed.deployment.kits import Kit
from fedmed.deployment.records import records_of
from fedmed.deployment.site_folder import SiteFolder, joined_kit, read_site_folder
from fedmed.deployment.supernode import try_door
from fedmed.errors import ConfigError, DataError, FedmedError
from fedmed.federated.site_config import read_peers, withdrawn_of
from fedmed.imaging.manifest import read_columns
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.same_keys import made_with
from fedmed.privacy import keys as site_keys
from fedmed.types import rounded_up

DISK_GIB = 5.0
DRY_ROUND_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the page: what was looked at, whether it is well, and what was found or what to do."""

    what: str
    ok: bool
    said: str


def check_site(path: Path, *, dry_round: bool = True) -> Iterator[Finding]:
    """Look at everything; what needs a thing that is missing is not looked at.

    Args:
        path: of site.toml, or its folder.
        dry_round: whether to train a small network on ten patients; no ledger and no state is touched.
    """
    try:
        site = read_site_folder(path)
    except FedmedError as error:
        yield Finding(what="site.toml", ok=False, said=str(error))
        return
    yield Finding(what="site.toml", ok=True, said=site.config.name)
    yield _look("versions", versions)
    yield _look("keys", lambda: keys(site))
    yield _look("approval", lambda: approval(site))
    data = _look("manifest", lambda: manifest(site))
    yield data
    yield _look("ledger", lambda: ledger(site))
    if site.config.policy is not None and site.config.policy.privacy.witness:
        folder = site.root / site.config.policy.privacy.witness
        yield _look("witness", lambda: witness(folder))
    yield _look("disk", lambda: disk(site))
    yield _look("door", lambda: try_door(site))
    if dry_round and data.ok:
        yield from tried(site)
    try:
        kit = joined_kit(site)
    except FedmedError as error:
        yield Finding(what="kit", ok=False, said=str(error))
        return
    yield _look("kit", lambda: fits(kit))
    yield _look("sums", lambda: others(site, kit))
    yield _look("authority", lambda: authority(kit))
    reached = _look("proxy", lambda: reach.proxy(kit))
    yield reached
    if reached.ok:
        reached = _look("port", lambda: reach.port(kit))
        yield reached
    if reached.ok:
        yield _look("certificate", lambda: reach.certificate(kit))
        yield _look("clock", lambda: reach.clock(kit))
        yield _look("list", lambda: reach.admission(kit, node_keys.read_node_key(site.keys)))


def _look(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, ok=True, said=look())
    except FedmedError as error:
        return Finding(what=what, ok=False, said=str(error))
    except OSError as error:
        return Finding(what=what, ok=False, said=f"{error.filename or 'a file'}: {error.strerror or 'cannot be used'}")


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
    """Whether all keys are there, whole, the owner's alone, and those that made the manifest's pseudonyms.

    Raises:
        ConfigError, DataError, LedgerUnusable: one is not.
    """
    node_keys.read_node_key(site.keys)
    pseudonyms = Pseudonyms(keys=site_keys.read_keys(site.keys))
    noted = made_with(pseudonyms, (site.root / site.config.manifest).parent)
    return "there, and read by their owner only" + ("; the manifest's pseudonyms are by them" if noted else "")


def fits(kit: Kit) -> str:
    """Whose kit it is, and whether it is for the fedmed that is installed here.

    Raises:
        ConfigError: it is for another one.
    """
    what = f"{kit.consortium} at {kit.address}, signed by {kit.fingerprint}"
    if kit.fedmed == fedmed.__version__ and app_hash() in kit.apps:
        return what
    theirs = "another app" if kit.fedmed == fedmed.__version__ else f"fedmed {kit.fedmed}"
    raise ConfigError(
        f"{what}; it is for {theirs}, and fedmed {fedmed.__version__} is installed here: install what the server has, "
        "or ask the coordinator for a newer kit"
    )


def others(site: SiteFolder, kit: Kit) -> str:
    """With whom the site would hide in a secure sum, and by which keys, to be compared by telephone.

    Raises:
        ConfigError: the kit has another key for this site, or was not joined whole.
        LedgerUnusable: the site's own keys cannot be read.
    """
    own = site_keys.read_keys(site.keys).public
    if kit.sites.get(kit.site) != own.hex():
        raise ConfigError("the kit has another key for this site; send the coordinator the newest card.json")
    if dict(read_peers(site.root)) != dict(kit.sites):
        raise ConfigError("the kit was not joined to its end; fedmed site join it again")
    known = [
        f"{name} {node_keys.fingerprint(bytes.fromhex(key))}" for name, key in kit.sites.items() if name != kit.site
    ]
    return f"secure sums are with {', '.join(known) or 'nobody yet'}; this site is {node_keys.fingerprint(own)}"


def approval(site: SiteFolder) -> str:
    """What the hospital agreed to, and until when.

    Raises:
        ConfigError: its end has passed.
    """
    if site.config.policy is None:
        return "none: site.toml has no [policy]"
    given = site.config.policy.approval
    what = f"for {given.purpose}" if given.purpose else "no purpose is named"
    if not given.expires:
        return f"{what}; without an end"
    left = given.expires - date.today()
    if left < timedelta(0):
        raise ConfigError(f"{what}; it ended on {given.expires}, and every task is refused (policy.approval.expires)")
    return f"{what}; until {given.expires}" + (
        f", {left.days} days: ask for the next one" if left < certificates.SOON else ""
    )


def manifest(site: SiteFolder) -> str:
    """Whether the manifest and the list of who withdrew can be read; the dry round reads ten patients' images.

    Raises:
        DataError: one of them cannot, or nobody is left.
        LedgerUnusable: the keys, without which nobody's pseudonym is known, cannot be read.
    """
    withdrawn = withdrawn_of(site.file)
    if site.config.dataset:
        return f"the site reads its data with {site.config.dataset}; not looked at"
    _, columns = read_columns(site.root / site.config.manifest)
    patients = columns["patient_id"]
    left = [patient for patient in patients if patient not in withdrawn]
    if not left:
        raise DataError("every patient of the manifest has opted out")
    gone = len(set(patients) & withdrawn)
    return f"{len(left)} rows of {len(set(left))} patients" + (f"; {gone} more withdrew (opt-out)" if gone else "")


def tried(site: SiteFolder) -> Iterator[Finding]:
    """What a process that is confined as a task finds: limits, device, and what a round on ten patients takes."""
    command = [sys.executable, "-P", "-m", "fedmed.deployment.dry_round", str(site.file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRY_ROUND_S)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        yield Finding(
            what="dry round", ok=False, said=f"not done after {DRY_ROUND_S:g} s; are the images on a slow disk?"
        )
    except (IndexError, ValueError):
        said = f"ended by signal {-done.returncode}; give tasks more memory (task-memory-gib), or this machine"
        if done.returncode >= 0:
            said = f"it could not start: {(done.stderr.splitlines() or ['it said nothing'])[-1]}"
        yield Finding(what="dry round", ok=False, said=said)
    else:
        yield from (Finding(what=what, ok=ok, said=said) for what, ok, said in found)


def ledger(site: SiteFolder) -> str:
    """Whether the ledger is whole, and what is spent.

    Raises:
        ConfigError: it has faults.
        LedgerUnusable: it cannot be read.
    """
    if site.config.policy is None:
        return "none: site.toml has no [policy]"
    if not (site.state / "ledger").exists():
        return f"none yet; ε up to {site.config.policy.privacy.epsilon:g} may be spent"
    records = records_of(site)
    found = records.examine(records.key())
    if found.faults:
        raise ConfigError(f"{len(found.faults)} faults; fedmed ledger verify names them. Do not train until then")
    limit, spent = site.config.policy.privacy.epsilon, rounded_up(found.spent.epsilon, 3)
    decides = rounded_up(found.spent.epsilon_rdp, 3)  # what may be added
    left = (
        f"{limit - float(decides):.3f} is left for more (of additions rdp decides: {decides})"
        if found.spent.epsilon_rdp < limit
        else f"and NOTHING may be added: private runs are refused (of additions rdp decides: {decides})"
    )
    odd = "; warnings, which fedmed ledger verify names" if found.warnings else ""
    return f"whole; ε = {spent} of {limit:g} is spent, {left}{odd}"


def witness(folder: Path) -> str:
    """Whether the ledger's second copy can be written: a task may not make its folder.

    Raises:
        ConfigError: it cannot.
    """
    if not folder.is_dir():
        raise ConfigError(
            "there is no such folder; make it for the user that the site runs as (policy.privacy.witness)"
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            return "its folder can be written"
    except OSError as error:
        raise ConfigError(f"its folder cannot be written ({error.strerror}; policy.privacy.witness)") from None


def disk(site: SiteFolder) -> str:
    """Whether there is room for logs and what tasks exchange, for state, and for the cache, wherever each lies.

    Raises:
        ConfigError: less than 5 GiB for one of them.
    """
    places = {"move the site's folder": site.root, "choose another state-dir": site.state}
    if site.config.cache_dir:
        places["choose another cache-dir"] = site.root / site.config.cache_dir
    free = {advice: _free_gib(folder) for advice, folder in places.items()}
    small = [f"{gib:.1f} GiB free: make room, or {advice}" for advice, gib in free.items() if gib < DISK_GIB]
    if small:
        raise ConfigError(f"{'; '.join(small)}. {DISK_GIB:g} GiB are needed")
    return f"{min(free.values()):.0f} GiB free"


def _free_gib(folder: Path) -> float:
    """Free on the disk of a folder, which a task may not have made yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free / 2**30


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
