"""Where a hospital's records lie: as its site.toml says, or in the folder of a simulated site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.deployment.site_folder import FILE, SiteFolder, read_site_folder
from fedmed.errors import ConfigError
from fedmed.privacy.chain import Anchor
from fedmed.privacy.chain_file import witness_path
from fedmed.privacy.keys import PUBLIC, read_public
from fedmed.privacy.verification import Findings, examine


@dataclass(frozen=True, kw_only=True)
class Records:
    """A site's ledger, audit log and egress manifest, the key that signed them, and the witness it names."""

    folder: Path
    public: Path
    witness: str = ""  # a folder; empty = beside the ledger

    def examine(self, key: bytes, *, anchors: Sequence[Anchor] = (), witnesses: Sequence[Path] = ()) -> Findings:
        """Check them, with the site's own witness besides those given.

        Raises:
            LedgerUnusable: there is no ledger, or it cannot be read at all.
        """
        own = [witness_path(self.folder / "ledger", key, self.witness)] if self.witness else []
        return examine(self.folder, key, anchors=anchors, witnesses=[*own, *witnesses])

    def key(self) -> bytes:
        """The public key beside the records.

        Raises:
            LedgerUnusable: it cannot be read.
        """
        return read_public(self.public)


def records_of(site: SiteFolder) -> Records:
    """Those of a hospital."""
    named = site.config.policy.privacy.witness if site.config.policy else ""
    return Records(folder=site.state, public=site.keys / PUBLIC, witness=str(site.root / named) if named else "")


def records_at(place: Path) -> Records:
    """Those of a folder that holds them, such as RUN/sites/NAME, or of a hospital's folder or site.toml.

    Raises:
        ConfigError: the site.toml is wrong, or there are no records.
    """
    found = Records(folder=place, public=place / "keys" / PUBLIC)
    if place.is_file() or (not (place / "ledger").exists() and (place / FILE).exists()):
        found = records_of(read_site_folder(place))
    if not (found.folder / "ledger").exists():
        text = "no ledger was opened there; name a hospital's folder that has taken part, or RUN/sites/NAME"
        raise ConfigError(f"{place}: {text}")
    return found
