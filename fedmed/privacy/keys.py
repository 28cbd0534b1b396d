"""A site's two keys: one signs what it records, one turns patients into digests that nobody else can make.

They lie in a folder apart from the ledger: whoever copies the database cannot try hospital numbers against its digests,
and whoever restores an old ledger does not restore an old key with it.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import secrets
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmed.durable import make_private, open_to_others, sync_folder, write_new
from fedmed.errors import LedgerUnusable

SIGNING, LINKING, PUBLIC = "signing.key", "linking.key", "site.pub"
DIGEST_BYTES = 16  # of a patient's link: 2⁶⁴ patients before two are likely to collide


@dataclass(frozen=True, kw_only=True)
class SiteKeys:
    """The keys of one site. Only `public` may leave it."""

    folder: Path
    _signing: bytes = field(repr=False)
    _linking: bytes = field(repr=False)

    @property
    def public(self) -> bytes:
        """The 32 bytes that signatures are checked with."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature (RFC 8032), 64 bytes."""
        return self._private.sign(message)

    def link(self, kind: str, value: bytes) -> bytes:
        """A keyed digest of something that identifies a patient: HMAC-SHA-256, cut to 16 bytes.

        Args:
            kind: of what, so that an id never equals a picture.
            value: the id, or the fingerprint of a picture.
        """
        return hmac.digest(self._linking, kind.encode() + b"\0" + value, hashlib.sha256)[:DIGEST_BYTES]

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._signing)


def signed_by(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the site with this public key signed the message."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def make_keys(folder: Path) -> SiteKeys:
    """Make the keys of a new site: two secrets with mode 0600 in a folder with mode 0700, and `site.pub`.

    Raises:
        LedgerUnusable: there are keys already, or the folder cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        make_private(partial)
        _write(partial / LINKING, secrets.token_bytes(32), 0o600)
        _write(partial / SIGNING, private.private_bytes_raw(), 0o600)
        _write(partial / PUBLIC, private.public_key().public_bytes_raw(), 0o644)
        partial.rename(folder)  # all of them or none
        sync_folder(folder.parent)
    except OSError as error:
        if folder.exists() and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            text = "this site has keys already; new ones would orphan its ledger"
            raise LedgerUnusable(text, rule="keys.exist") from None
        raise LedgerUnusable(f"the site's keys cannot be written ({error.strerror})", rule="keys.unwritable") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_keys(folder)


def read_keys(folder: Path) -> SiteKeys:
    """The keys in a folder.

    Raises:
        LedgerUnusable: they are missing, damaged, or others on this machine may read them.
    """
    return SiteKeys(folder=folder, _signing=_secret(folder / SIGNING), _linking=_secret(folder / LINKING))


def read_public(path: Path) -> bytes:
    """A site's public key, from its `site.pub`.

    Raises:
        LedgerUnusable: there is none.
    """
    return _bytes(path)


def _secret(path: Path) -> bytes:
    content = _bytes(path)
    if open_to_others(path):
        raise LedgerUnusable(f"{path.name} can be read by others on this machine; chmod 600 it", rule="keys.mode")
    return content


def _bytes(path: Path) -> bytes:
    try:
        content = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        text = f"the site's key {path.name} cannot be read ({error.strerror}); restore it from your safe"
        raise LedgerUnusable(text, rule="keys.unreadable") from None
    except ValueError:
        content = b""
    if len(content) != 32:
        raise LedgerUnusable(f"the site's key {path.name} is damaged; restore it from your safe", rule="keys.damaged")
    return content


def _write(path: Path, content: bytes, mode: int) -> None:
    """A new file of one hexadecimal line, on disk when this returns."""
    write_new(path, content.hex().encode() + b"\n", mode=mode)
