"""An archive that speaks DICOMweb (PS3.18): searched by QIDO-RS, page by page, and read by WADO-RS.

A password or token comes from the environment or from ~/.netrc, never from the command line, and stands in no message.
Proxies are those of the environment (HTTPS_PROXY, NO_PROXY).
"""

from __future__ import annotations

import logging
import os
import ssl
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from dicomweb_client.web import DICOMwebClient
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth
from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

from fedmed.errors import ConfigError, DataError, FedmedError, UnreadableImage
from fedmed.intake.archive import (
    NO_TLS,
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

PAGE = 200  # studies or series asked for at once
CHUNK = 2**16  # bytes read at once: objects are kept as they come, also over a slow line
TIMEOUT_S = (10.0, 60.0)  # until connected; between two bytes
LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)  # beside 5xx: worth asking again
ENDED = {  # what a status says, where asking again does not help
    401: "refuses the user name and password, or the token: set FEDMED_PACS_USER and FEDMED_PACS_PASSWORD, "
    "FEDMED_PACS_TOKEN, or a line in ~/.netrc (401)",
    403: "does not allow this user to search or read (403)",
    404: "has no DICOMweb service at this address (404)",
    407: "cannot be reached: the proxy wants a user name and password, in HTTPS_PROXY (407)",
}
NO_CREDENTIALS = (
    "wants a user name and password, or a token, and none is set in this shell: set FEDMED_PACS_USER and "
    "FEDMED_PACS_PASSWORD, FEDMED_PACS_TOKEN, or a line in ~/.netrc (401)"
)
WITHHELD = {403: "does not let this user read it (403)", 404: "does not have what it lists (404)"}
AS_STORED = (("application/dicom", "*"),)  # transfer syntax
NOT_DICOMWEB = "what answers at this address is no DICOMweb service"
NOT_DICOM = "the archive sent something that is no DICOM"  # a page of a proxy, say: it may pass
TORN = (InvalidDicomError, EOFError, NotImplementedError, struct.error, zlib.error)  # of `dcmread`, not of a page

Answer = dict[str, dict[str, Any]]  # DICOM JSON: tag to VR and Value

for _name in ("dicomweb_client", "urllib3"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)  # their log records hold UIDs and queries


class DicomWeb:
    """An archive behind a URL."""

    def __init__(self, url: str, *, ca: Path | None = None, certificate: Path | None = None) -> None:
        """Connect to nothing yet.

        Args:
            url: of the DICOMweb service, such as https://pacs/dicom-web.
            ca: as `archive.tls` takes it.
            certificate: likewise.

        Raises:
            ConfigError: the URL is none, or holds a password; or a file of TLS is missing or wrong.
        """
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise ConfigError(
                "--dicomweb: a password on the command line is seen by everybody on this machine; "
                "set FEDMED_PACS_USER and FEDMED_PACS_PASSWORD"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("--dicomweb: expected a URL such as https://pacs.hospital/dicom-web")
        session = requests.Session()
        session.auth = _credentials()
        session.mount("https://", _Trusting(tls(ca, certificate)))
        self._client = DICOMwebClient(
            url.rstrip("/"), session=session, timeout=TIMEOUT_S, permissive_uid=True, chunk_size=CHUNK
        )
        self._client.set_http_retry_params(retry=False)  # asking again is `archive.patiently`, for both protocols
        self._answered = False  # a search for studies

    def studies(self, question: Facts, patience: Patience = at_once) -> Iterator[Facts]:
        """As of `Archive`."""
        search, first = self._client.search_for_studies, not self._answered
        for study in self._pages(search, STUDY, question, patience, first=first):
            yield {keyword: _text(study, keyword) for keyword in STUDY}
        self._answered = True

    def series_of(self, study: str, patience: Patience = at_once) -> list[Facts]:
        """As of `Archive`."""
        search = partial(self._client.search_for_series, study_instance_uid=study)
        told = self._pages(search, SERIES, {}, patience)
        return [{keyword: _text(series, keyword) for keyword in SERIES} for series in told]

    def objects(self, series: Series) -> list[str]:
        """The SOP Instance UIDs of a series."""
        ask = self._client.search_for_instances
        search = partial(ask, study_instance_uid=series.study, series_instance_uid=series.series)
        return [_text(one, "SOPInstanceUID") for one in self._pages(search, (), {})]

    def fetch(self, series: Series, take: Callable[[Dataset], None]) -> None:
        """Read a whole series, in the transfer syntax that it is stored in."""
        with _plain():
            for dataset in self._client.iter_series(series.study, series.series, media_types=AS_STORED):
                take(dataset)

    def fetch_object(self, series: Series, uid: str, take: Callable[[Dataset], None]) -> None:
        """Read one object of a series, as it is stored.

        Raises:
            UnreadableImage: what came as DICOM is none that can be parsed.
        """
        with _plain():
            try:
                dataset = self._client.retrieve_instance(series.study, series.series, uid, media_types=AS_STORED)
            except TORN:
                raise UnreadableImage(NOT_DICOM) from None
        take(dataset)

    def _pages(
        self,
        search: Callable[..., list[Answer]],
        fields: tuple[str, ...],
        question: Facts,
        patience: Patience = at_once,
        *,
        first: bool = False,
    ) -> Iterator[Answer]:
        """All answers to a question; `first` as of `_plain`.

        Archives cut their answers where they like, and some know no pages at all.
        """
        seen: set[tuple[str, ...]] = set()

        def page(_: int) -> list[Answer]:
            with _plain(first=first):
                settings = {"fields": list(fields) or None, "search_filters": dict(question) or None}
                return search(limit=PAGE, offset=len(seen), **settings)

        while True:
            fresh = {key: one for one in patience(page) if (key := _key(one)) not in seen}
            yield from fresh.values()
            if not fresh:
                return
            seen |= fresh.keys()


class _Bearer(AuthBase):
    """A token, set in such a way that a line of ~/.netrc does not replace it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _Trusting(HTTPAdapter):
    """What TLS trusts and shows, and nothing more: requests would add authorities, its own or REQUESTS_CA_BUNDLE's."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._context)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, **kwargs, ssl_context=self._context)

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        return super().build_connection_pool_key_attributes(request, True, None)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """The context does it."""


def _credentials() -> AuthBase | None:
    """From the environment; None = requests looks into ~/.netrc."""
    if token := os.environ.get("FEDMED_PACS_TOKEN"):
        return _Bearer(token)
    if user := os.environ.get("FEDMED_PACS_USER"):
        return HTTPBasicAuth(user.encode(), os.environ.get("FEDMED_PACS_PASSWORD", "").encode())
    return None


@contextmanager
def _plain(*, first: bool = False) -> Iterator[None]:
    """What went wrong, without a URL, a query or a UID.

    Args:
        first: whether studies are searched for, and no search was answered yet. What is wrong there is wrong with the
            archive; later it costs no more than what was asked for: a line of a list, a study, a series or an object.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FedmedError:
        raise
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        sent = error.request is not None and "Authorization" in error.request.headers
        if status == HTTPStatus.UNAUTHORIZED and not sent:
            raise DataError(f"the archive {NO_CREDENTIALS}") from None
        if status in ENDED and (first or status not in WITHHELD):
            raise DataError(f"the archive {ENDED[status]}") from None
        if status in LATER or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise Interrupted(f"the archive answers with status {status}") from None
        if not first:
            raise Withheld(f"the archive {WITHHELD.get(status, f'answers with status {status}')}") from None
        raise DataError(
            f"the archive does not understand the search (status {status}); does the URL end where its "
            "DICOMweb service begins?"
        ) from None
    except requests.exceptions.SSLError as error:
        plain = any(sign in str(error) for sign in ("WRONG_VERSION_NUMBER", "UNEXPECTED_EOF", "HTTP_REQUEST"))
        raise DataError(NO_TLS if plain else _not_trusted(error)) from None
    except requests.exceptions.ProxyError as error:
        if "407" in str(error):
            raise DataError(f"the archive {ENDED[407]}") from None
        raise Unreached("the proxy of HTTPS_PROXY does not connect to the archive") from None
    except requests.exceptions.ConnectTimeout:
        raise Unreached("the archive cannot be reached: no answer") from None
    except requests.exceptions.InvalidJSONError:
        raise (DataError(NOT_DICOMWEB) if first else Unsent(NOT_DICOM)) from None
    except requests.exceptions.RequestException as error:
        reached = isinstance(error, requests.exceptions.ReadTimeout | requests.exceptions.ChunkedEncodingError)
        place = urlsplit(str(error.request.url)) if error.request is not None else urlsplit("")
        where = f" at {place.hostname}" + (f":{place.port}" if place.port else "") if place.hostname else ""
        if reached:
            raise Interrupted("the archive stopped answering") from None
        raise Unreached(f"the archive cannot be reached{where}") from None
    except Exception:  # not JSON, not multipart, not DICOM, or more than the memory holds
        raise (DataError(NOT_DICOMWEB) if first else Unsent(NOT_DICOM)) from None


def _not_trusted(error: requests.exceptions.SSLError) -> str:
    """As of `archive.not_trusted`, on the way that the request took."""
    url = str(error.request.url) if error.request is not None else ""
    place, way = urlsplit(url), select_proxy(url, get_environ_proxies(url))
    headers = HTTPAdapter().proxy_headers(way) if way else None
    proxy = prepend_scheme_if_needed(way, "http") if way else None
    return not_trusted(place.hostname or "", place.port or 443, proxy=proxy, headers=headers)


def _text(answer: Answer, keyword: str) -> str:
    """The first value of an element of DICOM JSON (PS3.18 F)."""
    values = answer.get(f"{tag_for_keyword(keyword):08X}", {}).get("Value") or [""]
    return str(values[0] or "").strip()


def _key(answer: Answer) -> tuple[str, ...]:
    return tuple(_text(answer, uid) for uid in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
