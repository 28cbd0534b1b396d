"""The key that a site's SuperNode proves itself with: ECDSA on P-384, in OpenSSH's form, as Flower reads it."""

from __future__ import annotations

import hashlib
import string
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedmed.deployment.files import OPEN, SECRET, write_new
from fedmed.durable import open_to_others
from fedmed.errors import ConfigError

PRIVATE, PUBLIC = "node.key", "node.pub"
DIGITS = 20  # of a fingerprint


def make_node_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """Make `node.key` (mode 0600, no passphrase: a service reads it) and `node.pub`.

    Raises:
        ConfigError: there is one already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_new(folder / PRIVATE, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), SECRET)
    write_new(folder / PUBLIC, public_text(key.public_key()).encode() + b"\n", OPEN)
    return key


def read_node_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """The site's private key.

    Raises:
        ConfigError: it is missing, damaged, on another curve, or others on this machine may read it.
    """
    path = folder / PRIVATE
    try:
        if open_to_others(path):
            raise ConfigError("node.key can be read by others on this machine; chmod 600 it")
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"the site's node.key cannot be read ({error.strerror}); run fedmed site keygen") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError("the site's node.key is damaged or has a passphrase; restore it from your safe") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("the site's node.key is no key on P-384; make one with fedmed site keygen")
    return key


def public_text(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as one line of OpenSSH's form."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def read_public_text(text: str) -> ec.EllipticCurvePublicKey:
    """The public key in one line of OpenSSH's form.

    Raises:
        ConfigError: it is none, or not on P-384.
    """
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("the node key is no ECDSA key on P-384")
    return key


def flower_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as Flower keeps it in its list of nodes."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """An ECDSA signature with SHA-384."""
    return key.sign(message, ec.ECDSA(hashes.SHA384()))


def signed_by(key: ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool:
    """Whether the owner of a node key signed a message."""
    try:
        key.verify(signature, message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def fingerprint(content: bytes) -> str:
    """Twenty hexadecimal digits of a SHA-256, in groups of four: to be compared by telephone (80 bits)."""
    digits = hashlib.sha256(content).hexdigest()[:DIGITS]
    return "-".join(digits[start : start + 4] for start in range(0, DIGITS, 4))


def digits_of(fingerprint: str) -> str:
    """The digits of a fingerprint, however they are grouped.

    Raises:
        ConfigError: they are not twenty.
    """
    digits = "".join(fingerprint.lower().replace("-", " ").split())
    if len(digits) != DIGITS or set(digits) - set(string.hexdigits):
        raise ConfigError(f"a fingerprint has {DIGITS} digits, such as 1f2e-3d4c-5b6a-7988-9706; this is {fingerprint}")
    return digits
