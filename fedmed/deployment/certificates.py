"""The consortium's certificate authority, and certificates of its server and coordinators: P-256, X.509 version 3."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmed.deployment.files import OPEN, SECRET, write_new
from fedmed.deployment.processes import LOOPBACK
from fedmed.durable import replacing, write_all
from fedmed.errors import ConfigError

# Files of tls/; kits and coordinators' folders hold the first of them too.
AUTHORITY, AUTHORITY_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.crt", "server.key"
AUTHORITY_DAYS = 3650
BACKDATE = timedelta(hours=1)  # for sites whose clocks are late
SOON = timedelta(days=30)  # before its end a certificate or an approval is renewed, and a site's check warns


def make_authority(folder: Path, name: str) -> None:
    """Make `ca.key` (0600) and `ca.crt`, which signs certificates of the server and of coordinators, and nothing else.

    A key that is there without its certificate, after a crash between the two, is taken.

    Raises:
        ConfigError: there is one already, or its key is damaged.
    """
    place = folder / AUTHORITY_KEY
    if place.exists() and not (folder / AUTHORITY).exists():
        key = _read_key(place)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        write_new(place, _pem(key), SECRET)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} certificate authority"[:64])])
    start = datetime.now(UTC) - BACKDATE
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_new(folder / AUTHORITY, certificate.public_bytes(Encoding.PEM), OPEN)


def make_server_certificate(folder: Path, names: Sequence[str], days: int) -> x509.Certificate:
    """Make `server.key` (0600) and `server.crt`, in the place of those that are there, signed by `ca.key`.

    Args:
        folder: of the authority and of the server's files.
        names: DNS names and IP addresses that sites connect to; loopback is added.
        days: of validity, never beyond the authority's.

    Raises:
        ConfigError: the authority cannot be read.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed(
        folder,
        key.public_key(),
        names[0],
        days,
        ExtendedKeyUsageOID.SERVER_AUTH,
        x509.SubjectAlternativeName(_alternatives(names)),
    )
    with (
        replacing(folder / SERVER, mode=OPEN) as public,
        replacing(folder / SERVER_KEY, mode=SECRET) as secret,
    ):  # `belong_together` finds what a kill between the two names leaves
        write_all(public, certificate.public_bytes(Encoding.PEM))
        write_all(secret, _pem(key))
    return certificate


def make_coordinator_certificate(
    folder: Path, name: str, days: int, request: bytes | None = None
) -> tuple[bytes, bytes | None]:
    """A certificate by which the server knows a coordinator, signed by `ca.key`. It can stand for no server.

    Args:
        folder: of the authority.
        name: of the coordinator.
        days: of validity, never beyond the authority's.
        request: a signing request (PEM) for a key that was made elsewhere; only its key counts.

    Returns:
        The certificate and, without a request, its new key; both PEM.

    Raises:
        ConfigError: the authority cannot be read, or the request is damaged or for another kind of key.
    """
    key = ec.generate_private_key(ec.SECP256R1()) if request is None else None
    public = key.public_key() if key is not None else _requested_key(request or b"")
    certificate = _signed(folder, public, name, days, ExtendedKeyUsageOID.CLIENT_AUTH)
    return certificate.public_bytes(Encoding.PEM), None if key is None else _pem(key)


def belong_together(certificate: x509.Certificate, key: Path) -> bool:
    """Whether a file holds the private key of a certificate."""
    try:
        return _read_key(key).public_key() == certificate.public_key()
    except ConfigError:
        return False


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in a PEM file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return parse_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: no certificate can be read there ({error.strerror})") from None
    except ConfigError as error:
        raise ConfigError(f"{error}: {path}") from None


def parse_certificate(pem: bytes) -> x509.Certificate:
    """The certificate in a PEM text.

    Raises:
        ConfigError: it is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError("the certificate is damaged") from None


def alternative_names(certificate: x509.Certificate) -> set[str]:
    """The DNS names and IP addresses that a certificate stands for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def problem(certificate: x509.Certificate, authority: x509.Certificate, moment: datetime) -> str | None:
    """What is wrong with a certificate now, as a sentence, or None.

    Args:
        certificate: of the server.
        authority: that should have signed it.
        moment: with its time zone.
    """
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return "it was not signed by the consortium's authority"
    for who, each in (("it", certificate), ("the consortium's authority", authority)):
        if moment < each.not_valid_before_utc:
            return (
                f"{who} is valid from {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; is this machine's clock right?"
            )
        if moment > each.not_valid_after_utc:
            return f"{who} expired on {each.not_valid_after_utc:%Y-%m-%d}"
    return None


def ends_soon(certificate: x509.Certificate, moment: datetime) -> bool:
    """Whether a certificate should be renewed."""
    return moment > certificate.not_valid_after_utc - SOON


def stands_for(certificate: x509.Certificate, names: Sequence[str]) -> bool:
    """Whether a server's certificate is for these names and addresses, loopback, and no others."""
    return alternative_names(certificate) == {str(name.value) for name in _alternatives(names)}


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in dict.fromkeys((*names, *LOOPBACK)):  # the server's own tasks come from there
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _signed(
    folder: Path,
    public: ec.EllipticCurvePublicKey,
    name: str,
    days: int,
    purpose: x509.ObjectIdentifier,
    *more: x509.ExtensionType,
) -> x509.Certificate:
    """A certificate for one purpose, signed by the folder's authority."""
    authority, signer = read_certificate(folder / AUTHORITY), _read_key(folder / AUTHORITY_KEY)
    start = datetime.now(UTC) - BACKDATE
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
        .issuer_name(authority.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(min(start + timedelta(days=days), authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    try:
        asked = x509.load_pem_x509_csr(request)
        key, whole = asked.public_key(), asked.is_signature_valid
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError("the signing request is damaged; openssl req -new makes one") from None
    if not whole or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.key_size < 256:
        raise ConfigError("the signing request is unsigned, or not for an elliptic key of at least 256 bits")
    return key


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read ({error.strerror})") from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: the key is damaged; restore it from your safe")
    return key
