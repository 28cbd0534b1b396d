"""What a site has masked and opened in one run, and the key that it did it with: one small file, and no second copy.

It is written before an update or a seed leaves. So no server gets two updates under the same masks, or both the mask
and the piece of a site, however often it asks, and whoever is killed. The key lies in the same file: who loses what was
masked loses the key too, and begins with another one. An old copy of the file is the one thing that must not come back.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmed.durable import sync_folder, write_json
from fedmed.errors import PolicyRefused

FILE, LOCK = "secure-sum.json", "secure-sum.lock"


@dataclass(frozen=True, kw_only=True)
class Noted:
    """What stands in the file."""

    secret: str  # X25519 private key of this run, hexadecimal
    attempt: int = 0  # the newest that anything was masked for; attempts only grow
    sites: str = ""  # SHA-256 over who has masks in common in it
    asked: str = ""  # SHA-256 over all that its sites were asked; the masks are for this
    values: str = ""  # SHA-256 over what was masked
    joined: tuple[str, ...] = ()  # for whom it was opened


@dataclass(frozen=True, kw_only=True)
class MaskRecord:
    """The file of one run at one site. Nothing in it ever leaves."""

    folder: Path

    def key(self) -> X25519PrivateKey:
        """The site's private key for this run, made when it is first asked for.

        Raises:
            PolicyRefused: the file is damaged.
        """
        with self._locked() as noted:
            return X25519PrivateKey.from_private_bytes(bytes.fromhex(noted.secret))

    def require_new(self, attempt: int, *, again: bool) -> None:
        """Refuse an attempt that is over, before anything is trained for it.

        Args:
            attempt: its number.
            again: whether training would give the same bits once more, so that the newest attempt may be repeated.

        Raises:
            PolicyRefused: as said, or the file is damaged.
        """
        with self._locked() as noted:
            if attempt < noted.attempt:
                raise _old()
            if attempt == noted.attempt and not again:
                raise _used()

    def note_masked(self, attempt: int, *, sites: str, asked: str, values: str) -> None:
        """Write down that values are about to leave under the masks of an attempt; arguments as in `Noted`.

        Raises:
            PolicyRefused: others left under them, or a later attempt has begun.
        """
        with self._locked() as noted:
            new = Noted(secret=noted.secret, attempt=attempt, sites=sites, asked=asked, values=values)
            if replace(noted, joined=()) == new:
                return  # asked again, it sends the same bits
            if attempt < noted.attempt:
                raise _old()
            if attempt == noted.attempt:
                raise _used()
            self._write(new)

    def note_opened(self, attempt: int, sites: str, joined: Sequence[str]) -> str:
        """Write down for which sites a sum is about to be opened, and return its `asked`.

        Raises:
            PolicyRefused: this site has masked nothing for it, or it was opened for other sites.
        """
        with self._locked() as noted:
            if (noted.attempt, noted.sites) != (attempt, sites) or not noted.asked:
                raise PolicyRefused("this site has no update in that sum", rule="secure-sum.once")
            if noted.joined not in ((), tuple(joined)):
                raise PolicyRefused("the sum was opened for other sites before", rule="secure-sum.once")
            self._write(replace(noted, joined=tuple(joined)))
            return noted.asked

    @contextmanager
    def _locked(self) -> Iterator[Noted]:
        """What stands in the file, which nobody else reads or writes meanwhile; at first a key and nothing else."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / FILE
            if not path.exists():
                self._write(Noted(secret=os.urandom(32).hex()))
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                noted = Noted(**{**values, "joined": tuple(values["joined"])})
                if len(bytes.fromhex(noted.secret)) != 32 or not isinstance(noted.attempt, int):
                    raise ValueError
            except (OSError, ValueError, TypeError, KeyError):
                text = f"{path} is damaged; remove it, and this site goes on with a new key once it is greeted again"
                public = "the record of its masks is damaged"
                raise PolicyRefused(text, rule="secure-sum.record", public=public) from None
            yield noted

    def _write(self, noted: Noted) -> None:
        write_json(self.folder / FILE, asdict(noted), mode=0o600)


def _used() -> PolicyRefused:
    text = (
        "another update has left under these masks; a task that was ended and asked again gives other numbers under "
        "differential privacy and on a GPU. The site takes part again in the next round"
    )
    return PolicyRefused(text, rule="secure-sum.once")


def _old() -> PolicyRefused:
    text = "this sum is older than another that the site took part in; is the server's clock right?"
    return PolicyRefused(text, rule="secure-sum.once")
