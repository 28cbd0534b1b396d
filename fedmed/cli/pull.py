"""What `fedmed data pull` does and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from fedmed.cli.display import bar
from fedmed.errors import ConfigError, RunFailed
from fedmed.federated.site_config import read_site_config
from fedmed.intake.archive import Archive
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.pull import pull
from fedmed.intake.query import parse_query
from fedmed.intake.same_keys import holds_pseudonyms, made_with
from fedmed.privacy.keys import make_keys, read_keys


def pull_images(
    out: Path,
    *,
    dicomweb: str,
    ca: Path | None,
    certificate: Path | None,
    pacs: str,
    called: str,
    calling: str,
    query: str,
    table: Path | None,
    rate: float,
    site: Path | None,
    keys: Path | None,
) -> None:
    """Pull, and say what came and what is next.

    Raises:
        ConfigError: the options contradict each other.
        DataError: the archive refuses, is gone, or has nothing that meets the query.
        RunFailed: some series did not come in full.
    """
    if bool(dicomweb) == bool(pacs):
        raise ConfigError("give either --dicomweb URL or --pacs HOST:PORT")
    wanted = parse_query(query, table)
    archive = _web(dicomweb, ca, certificate) if dicomweb else _dimse(pacs, called, calling, ca, certificate)
    pseudonyms = site_pseudonyms(site, keys, out)
    with bar("finding, then pulling series") as progress:
        searching = None if progress is None else lambda found: progress(found, None)
        pulled = pull(archive, wanted, out, pseudonyms, megabytes_per_s=rate, progress=progress, searching=searching)
    print(pulled)
    if pulled.failed:
        why = "; ".join(f"{count} × {reason}" for reason, count in pulled.why.most_common(3))
        text = f"{pulled.failed} series did not come in full ({why}); the same command asks for what is missing"
        raise RunFailed(text)
    if pulled.quarantined:
        print(f"next, look at what is in quarantine: fedmed data quarantine {quote(str(out))}")
    else:
        own = f"--site {quote(str(site))}" if site else f"--keys {quote(str(keys))}"
        print(f"next: fedmed data import dicom {quote(str(out))} --out DIR --table CSV {own}")


def site_pseudonyms(site: Path | None, keys: Path | None, *folders: Path, make: bool = True) -> Pseudonyms:
    """Pseudonyms under a site's keys, which are made where the folder for them is missing.

    Args:
        site: a site.toml, or the folder that holds it.
        keys: the folder of the keys instead.
        folders: that pseudonyms are read from or written to. Where one has some already, no new keys are made.
        make: whether new keys may be made at all.

    Raises:
        ConfigError: neither or both are given, the site.toml is wrong, or keys are missing with which a folder was
            filled or that may not be made.
        DataError: a folder was filled with other keys.
        LedgerUnusable: a key is damaged, others may read it, or it cannot be written.
    """
    if site is not None and keys is None:
        file = site / "site.toml" if site.is_dir() else site
        keys = file.parent / read_site_config(file).keys_dir
    elif site is not None:
        raise ConfigError("give --site or --keys, not both: a site.toml says where its keys are")
    elif keys is None:
        raise ConfigError("pseudonyms need the site's key: give --site SITE, or --keys DIR where there is no site.toml")
    filled = [folder for folder in folders if holds_pseudonyms(folder)]
    if not keys.exists() and filled:
        raise ConfigError(f"{keys}: no keys there, and others made the pseudonyms in {filled[0]}; name those")
    if not keys.exists() and not make:
        raise ConfigError(f"{keys}: no keys there; give the --site whose keys made the pseudonyms")
    if not keys.exists():
        print(f"made new keys in {keys}; keep a copy of them in a safe", file=sys.stderr)
    pseudonyms = Pseudonyms(keys=read_keys(keys) if keys.exists() else make_keys(keys))
    for folder in filled:
        if not made_with(pseudonyms, folder):
            text = "does not say which keys made its pseudonyms; were they others, opt-outs and tables match nobody"
            print(f"warning: {folder} {text}", file=sys.stderr)
    return pseudonyms


def site_opt_out(site: Path | None) -> Path | None:
    """The list of who withdrew that a site.toml names; None without one.

    Raises:
        ConfigError: the site.toml is wrong.
    """
    if site is None:
        return None
    file = site / "site.toml" if site.is_dir() else site
    named = read_site_config(file).opt_out
    return file.parent / named if named else None


def _web(url: str, ca: Path | None, certificate: Path | None) -> Archive:
    from fedmed.deployment.processes import LOOPBACK
    from fedmed.intake.dicomweb import DicomWeb  # heavy

    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        print("warning: over http, the password and the images can be read on the way; use https", file=sys.stderr)
    return DicomWeb(url, ca=ca, certificate=certificate)


def _dimse(address: str, called: str, calling: str, ca: Path | None, certificate: Path | None) -> Archive:
    from fedmed.intake.dimse import Dimse  # heavy

    return Dimse(address, called=called, calling=calling, ca=ca, certificate=certificate)
