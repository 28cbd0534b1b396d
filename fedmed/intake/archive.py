"""What an archive must be able to do, whichever protocol it speaks; TLS to it, and patience with it."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from cryptography import x509
from pydicom.dataset import Dataset

from fedmed.errors import ConfigError, DataError
from fedmed.intake.query import Series

ATTEMPTS = 5
NO_TLS = "TLS: this port of the archive does not speak TLS; is it http://, or another port?"
LOOK_S = 10.0

Answer = TypeVar("Answer")
Facts = Mapping[str, str]  # keyword to value, of a study or a series; "" = the archive does not say
STUDY = ("StudyInstanceUID", "StudyDescription", "AccessionNumber", "PatientID", "StudyDate")
SERIES = ("SeriesInstanceUID", "Modality", "SeriesDescription", "BodyPartExamined", "NumberOfSeriesRelatedInstances")


class Interrupted(DataError):
    """An archive did not answer, or broke off. Asking again may help."""


class Unreached(Interrupted):
    """Nobody answers. If nobody ever did, it is as likely the address or a name that is wrong."""


class Unsent(Interrupted):
    """An archive answers, and does not send all that it lists."""


class Withheld(Unsent):
    """An archive says that it does not send something that it lists. Asking again does not help."""


class Patience(Protocol):
    """How often one question is asked; it is called with the number of the attempt, from 0."""

    def __call__(self, ask: Callable[[int], Answer], /) -> Answer:
        """The answer."""


def at_once(ask: Callable[[int], Answer]) -> Answer:
    """The answer to a question that is asked once."""
    return ask(0)


class Archive(Protocol):
    """A PACS or a vendor-neutral archive."""

    def studies(self, question: Facts, patience: Patience = at_once) -> Iterator[Facts]:
        """`STUDY` of every study that meets a question, as they are told; perhaps some of them twice.

        Raises:
            DataError: no search was answered yet, and the archive refuses.
            Unsent: it cannot answer this question.
        """

    def series_of(self, study: str, patience: Patience = at_once) -> list[Facts]:
        """`SERIES` of every series of a study.

        Raises:
            Unsent: the archive cannot tell.
        """

    def objects(self, series: Series) -> list[str]:
        """The SOP Instance UIDs of a series."""

    def fetch(self, series: Series, take: Callable[[Dataset], None]) -> None:
        """Read a whole series, object by object."""

    def fetch_object(self, series: Series, uid: str, take: Callable[[Dataset], None]) -> None:
        """Read one object.

        Raises:
            UnreadableImage: what came is no object that can be parsed.
        """


def tls(ca: Path | None, certificate: Path | None) -> ssl.SSLContext:
    """What a TLS connection to an archive trusts and shows: TLS 1.2 or later, and the archive's name must fit.

    Args:
        ca: certificates of the authority that signed the archive's (PEM); None = those of the system.
        certificate: of this machine with its key (PEM), for an archive that asks for one; None = none.

    Raises:
        ConfigError: a file is missing, or holds something else.
    """
    for name, path in (("--ca", ca), ("--certificate", certificate)):
        if path and not path.is_file():
            raise ConfigError(f"{name} {path}: no such file")
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError):  # SSLError is an OSError
        raise ConfigError(f"--ca {ca}: no certificate in PEM can be read there") from None
    try:
        if certificate:
            context.load_cert_chain(certificate, password="")  # else OpenSSL asks at the terminal
    except (OSError, ValueError):
        text = "expected a certificate and its key without a password, both in PEM"
        raise ConfigError(f"--certificate {certificate}: {text}") from None
    return context


def not_trusted(host: str, port: int, *, proxy: str | None = None, headers: dict[str, str] | None = None) -> str:
    """Why a certificate was refused, and by whom it is signed: one look without trust, at which nothing is asked.

    A proxy that opens TLS shows a certificate of its own, for the archive's name; its issuer's name gives it away.

    Args:
        host: of the archive.
        port: likewise.
        proxy: URL of the one that leads to it; None = none does. One that is spoken to by TLS itself is left alone.
        headers: for that proxy.
    """
    context, way = ssl.create_default_context(), urlsplit(proxy or "")
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    place = (way.hostname or "", way.port or http.client.HTTP_PORT) if proxy else (host, port)
    line = http.client.HTTPSConnection(*place, timeout=LOOK_S, context=context)
    if proxy:
        line.set_tunnel(host, port, headers)
    signed = "it is not said by whom it is signed"
    try:
        if way.scheme == "https":  # a password for it must not pass in the clear
            raise ConnectionError
        line.connect()
        shown = x509.load_der_x509_certificate(line.sock.getpeercert(binary_form=True) or b"")
        signed = f"it is signed by {shown.issuer.rfc4514_string()!r}"
    except (OSError, http.client.HTTPException, ValueError):
        pass  # it answers no more, or asks for a certificate first
    finally:
        line.close()
    return (
        f"TLS: the certificate of the archive is not trusted, or belongs to another name; {signed}. If that is the "
        "hospital's authority, give its certificate with --ca; if a proxy's that opens TLS, exempt the archive from it"
    )


def patiently(ask: Callable[[int], Answer], *, wait_s: float, attempts: int = ATTEMPTS) -> Answer:
    """The answer to a question that is repeated while it may help, after 1, 2, 4 … times a wait.

    Args:
        ask: called with the number of the attempt, from 0.
        wait_s: the first wait, seconds.
        attempts: at most, from 1.

    Raises:
        Interrupted: by the last attempt, or by one that says that no other helps.
    """
    for attempt in range(attempts):
        try:
            return ask(attempt)
        except Withheld:
            raise
        except Interrupted:
            if attempt == attempts - 1:
                raise
            time.sleep(wait_s * 2**attempt)
    raise AssertionError("unreachable")
