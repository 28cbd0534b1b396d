"""An archive that speaks DIMSE (PS3.4 C): searched by C-FIND, read by C-GET over the same connection.

C-GET needs no listener: objects come back on the association that this side opened, so no port is opened here and the
archive need not know where this machine is, only its name (the calling AE title).
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.events import Event

from fedmed.errors import ConfigError, DataError, FedmedError
from fedmed.imaging.dicom.kinds import KINDS
from fedmed.intake.archive import (
    SERIES,
    STUDY,
    Facts,
    Interrupted,
    Patience,
    Unreached,
    Unsent,
    Withheld,
    at_once,
    not_trusted,
    tls,
)
from fedmed.intake.query import Series

FIND, GET = UID("1.2.840.10008.5.1.4.1.2.2.1"), UID("1.2.840.10008.5.1.4.1.2.2.3")  # study root (PS3.4 C.6.2)
SYNTAXES = (  # each in a context of its own, so that the archive sends what it has and need not recode
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLosslessSV1, JPEG2000Lossless, JPEGLSLossless, RLELossless,
    JPEGBaseline8Bit, JPEG2000, JPEGExtended12Bit, JPEGLossless, JPEGLSNearLossless, DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)  # fmt: skip
CONTEXTS = 127  # of an association, beside the one for the query (PS3.8 9.3.2)
TIMEOUT_S = 60
CONNECT_S = 10
WORD_S = 2  # in which an archive that refuses a certificate says so
PENDING, SUCCESS = (0xFF00, 0xFF01), 0x0000
BUSY = (0xA700,)  # out of resources (PS3.4 C.4.1.1.4): worth asking again
REFUSED = {  # diagnostic of a rejected association (PS3.8 9.3.4), for the service user
    3: "does not know this machine: ask for an entry with the calling AE title given by --calling",
    7: "has another name than --called",
}

logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)  # its log records hold queries


class Dimse:
    """An archive at a host and port."""

    def __init__(
        self, address: str, *, called: str, calling: str, ca: Path | None = None, certificate: Path | None = None
    ) -> None:
        """Connect to nothing yet.

        Args:
            address: HOST:PORT.
            called: the archive's AE title.
            calling: the AE title under which the archive knows this machine.
            ca: as `archive.tls` takes it; with it, connections are by TLS (PS3.15 B.9 and B.10), else plain.
            certificate: likewise.

        Raises:
            ConfigError: one of them cannot be right.
        """
        self._host, _, port = address.rpartition(":")
        if not self._host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError("--pacs: expected HOST:PORT, such as pacs.hospital:104")
        for name, title in (("--called", called), ("--calling", calling)):
            if not 0 < len(title.strip()) <= 16 or not title.isascii():
                raise ConfigError(f"{name}: an AE title has 1 to 16 letters; --pacs needs --called and --calling")
        if certificate and not ca:
            raise ConfigError("--certificate is for TLS, which --pacs speaks with --ca alone")
        self._port, self._called, self._calling = int(port), called, calling
        self._tls = tls(ca, certificate) if ca else None
        self._answered = False  # a search for studies

    def studies(self, question: Facts, patience: Patience = at_once) -> Iterator[Facts]:
        """As of `Archive`."""
        for study in self._search("STUDY", dict.fromkeys(STUDY, "") | dict(question), patience):
            yield {keyword: _text(study, keyword) for keyword in STUDY}
        self._answered = True

    def series_of(self, study: str, patience: Patience = at_once) -> list[Facts]:
        """As of `Archive`."""
        told = self._search("SERIES", {"StudyInstanceUID": study} | dict.fromkeys(SERIES, ""), patience)
        return [{keyword: _text(series, keyword) for keyword in SERIES} for series in told]

    def objects(self, series: Series) -> list[str]:
        """The SOP Instance UIDs of a series."""
        return [uid for uid, _ in self._objects(series)]

    def fetch(self, series: Series, take: Callable[[Dataset], None]) -> None:
        """Read a whole series, in the transfer syntax that it is stored in."""
        kinds = {kind for _, kind in self._objects(series) if kind}
        self._get({"QueryRetrieveLevel": "SERIES"}, series, kinds, take)

    def fetch_object(self, series: Series, uid: str, take: Callable[[Dataset], None]) -> None:
        """Read one object of a series."""
        kinds = {kind for name, kind in self._objects(series) if name == uid and kind}
        self._get({"QueryRetrieveLevel": "IMAGE", "SOPInstanceUID": uid}, series, kinds, take)

    def _objects(self, series: Series) -> list[tuple[str, str]]:
        """SOP Instance UIDs and, where the archive says them, SOP classes."""
        where = {"StudyInstanceUID": series.study, "SeriesInstanceUID": series.series}
        found = self._search("IMAGE", where | {"SOPInstanceUID": "", "SOPClassUID": ""})
        return [(_text(one, "SOPInstanceUID"), _text(one, "SOPClassUID")) for one in found]

    def _search(self, level: str, keys: dict[str, str], patience: Patience = at_once) -> list[Dataset]:
        return patience(lambda _: self._found(level, keys))

    def _found(self, level: str, keys: dict[str, str]) -> list[Dataset]:
        """All answers to one question.

        Raises:
            DataError: the archive refuses to look for studies, and never did so, so it will not for any.
            Unsent: it cannot tell of what was asked, for now.
            Withheld: it refuses to.
            Interrupted: it broke off.
            Unreached: nothing answers, or never did.
        """
        entity = AE(ae_title=self._calling)
        entity.add_requested_context(FIND)
        association = self._associated(entity)
        found = []
        try:
            for status, answer in association.send_c_find(_identifier({"QueryRetrieveLevel": level} | keys), FIND):
                if "Status" not in status and level == "STUDY" and not self._answered:
                    text = f"does it know this machine as {self._calling} (--calling), and let it search?"
                    raise Unreached(f"the archive took the call and does not answer the search; {text}")
                if "Status" not in status:
                    raise Interrupted("the archive stopped answering")
                if status.Status in PENDING and answer is not None:
                    found.append(answer)
                elif status.Status != SUCCESS:
                    said = f"the archive does not answer the search (status {status.Status:04X})"
                    if level == "STUDY" and not self._answered:
                        raise DataError(said)
                    raise Unsent(said) if status.Status in BUSY else Withheld(said)
        finally:
            association.release()
        return found

    def _get(self, keys: dict[str, str], series: Series, kinds: set[str], take: Callable[[Dataset], None]) -> None:
        """C-GET; what the archive stores here meanwhile goes to `take`."""
        failure: list[FedmedError] = []

        def stored(event: Event) -> int:
            try:
                dataset = event.dataset
                dataset.file_meta = event.file_meta
                take(dataset)
            except FedmedError as error:
                failure.append(error)
            except Exception:
                failure.append(Interrupted("the archive sent what is no DICOM object"))
            return 0xA700 if failure else SUCCESS

        entity = AE(ae_title=self._calling)
        entity.add_requested_context(GET)
        roles = []
        for kind, syntaxes in _contexts(kinds):
            for syntax in syntaxes:
                entity.add_requested_context(kind, syntax)
            roles.append(build_role(kind, scp_role=True))
        association = self._associated(entity, ext_neg=roles, evt_handlers=[(evt.EVT_C_STORE, stored)])
        where = {"StudyInstanceUID": series.study, "SeriesInstanceUID": series.series}
        status: int | None = None
        try:
            for answer, _ in association.send_c_get(_identifier(keys | where), GET):
                status = answer.get("Status")
                if failure:
                    raise failure[0]
            if status is None:
                raise Interrupted("the archive stopped answering")
            if status != SUCCESS:
                raise Interrupted(f"the archive did not send everything (status {status:04X})")
        except BaseException:
            association.abort()
            raise
        association.release()

    def _associated(self, entity: AE, **options: Any) -> Association:
        """An open association.

        Raises:
            DataError: the archive refuses it, or TLS fails.
            Interrupted: the archive refuses it for now.
            Unreached: nothing answers.
        """
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT_S
        entity.connection_timeout = CONNECT_S
        if self._tls:
            options["tls_args"] = (self._tls, self._host)
        association = entity.associate(self._host, self._port, ae_title=self._called, **options)
        if association.is_established:
            return association
        if association.is_rejected:
            answer = association.acceptor.primitive
            if answer is not None and answer.result_source == 1 and answer.diagnostic in REFUSED:
                raise DataError(f"the archive {REFUSED[answer.diagnostic]}")
            raise Interrupted("the archive refuses the connection for now")
        self._check_tls()
        raise Unreached(f"the archive cannot be reached at {self._host}:{self._port}")

    def _check_tls(self) -> None:
        """Say what TLS has to say, of which pynetdicom tells nothing: shake hands once more, and hang up.

        Raises:
            DataError: it is TLS that fails.
        """
        if self._tls is None:
            return
        with suppress(TimeoutError, ConnectionError, socket.gaierror):  # no matter of TLS
            try:
                with (
                    socket.create_connection((self._host, self._port), CONNECT_S) as line,
                    self._tls.wrap_socket(line, server_hostname=self._host) as secured,
                ):
                    secured.settimeout(WORD_S)
                    secured.recv(1)  # TLS 1.3 refuses a client's certificate after the client has done its part
            except ssl.SSLCertVerificationError:
                raise DataError(not_trusted(self._host, self._port)) from None
            except ssl.SSLError as error:
                raise DataError(f"TLS: the archive {_refusal(error)}") from None


def _refusal(error: ssl.SSLError) -> str:
    said = error.reason or ""
    if "ALERT" in said and ("CERTIFICATE" in said or "HANDSHAKE" in said or "UNKNOWN_CA" in said):
        return "asks for a certificate of this machine that it trusts: give one, with its key, with --certificate"
    return "does not speak TLS 1.2 or later at this port"


def _contexts(kinds: set[str]) -> Iterator[tuple[str, list[Any]]]:
    """Which syntaxes are offered for which kinds: every one apart where they fit, else those that all can send."""
    wanted = sorted(kinds) or sorted(KINDS)
    each = max(1, CONTEXTS // len(wanted))
    for kind in wanted[:CONTEXTS]:
        yield kind, list(SYNTAXES[:each])


def _identifier(keys: dict[str, str]) -> Dataset:
    identifier = Dataset()
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    return identifier


def _text(answer: Dataset, keyword: str) -> str:
    try:
        return str(answer.get(keyword) or "").strip()
    except ValueError:  # no number where there should be one
        return ""
