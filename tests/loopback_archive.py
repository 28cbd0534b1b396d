"""An archive of pynetdicom's on loopback, plain or by TLS; a real one is in orthanc."""

import csv
import gc
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydicom.dataset import Dataset
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
from pynetdicom.association import Association
from pynetdicom.dul import DULServiceProvider

from fedmed.intake.dimse import FIND, GET, Dimse
from fedmed.intake.query import Query

ANY = Query(dates="19000101-")


class Holdings:
    """An archive's objects, and how it misbehaves."""

    def __init__(self, *objects: Dataset) -> None:
        self.objects = list(objects)
        self.sent: list[str] = []
        self.breaks_after = -1  # objects, then the association is aborted
        self.lost: list[str] = []  # objects that are listed, and never sent
        self.silent = False  # when it is asked for the objects of a series

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        level = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
        seen = set()
        if self.silent and asked.QueryRetrieveLevel == "IMAGE":
            event.assoc.abort()
            return
        for ds in self.objects:
            if not all(str(ds.get(key.keyword, "")) == str(key.value) for key in asked if self._is_key(key)):
                continue
            if (uid := ds[level[asked.QueryRetrieveLevel]].value) not in seen:
                seen.add(uid)
                answer = Dataset()
                for key in asked:
                    setattr(answer, key.keyword, ds.get(key.keyword, ""))
                answer.QueryRetrieveLevel = asked.QueryRetrieveLevel
                if "NumberOfSeriesRelatedInstances" in asked:
                    same = [one for one in self.objects if one.SeriesInstanceUID == ds.SeriesInstanceUID]
                    answer.NumberOfSeriesRelatedInstances = len(same)
                yield 0xFF00, answer

    @staticmethod
    def _is_key(key: object) -> bool:
        unique = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID", "AccessionNumber")
        return bool(key.value) and key.keyword in unique

    def get(self, event: evt.Event) -> Iterator[object]:
        asked = event.identifier
        wanted = [
            ds
            for ds in self.objects
            if all(str(ds.get(key.keyword)) == key.value for key in asked if self._is_key(key))
            and str(ds.SOPInstanceUID) not in self.lost
        ]
        yield len(wanted)
        for number, ds in enumerate(wanted):
            if number == self.breaks_after:
                event.assoc.abort()
                return
            self.sent.append(str(ds.SOPInstanceUID))
            yield 0xFF00, ds


@contextmanager
def archive_of(holdings: Holdings, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Its address."""
    entity = AE(ae_title="ARCHIVE")
    entity.require_called_aet = True
    entity.require_calling_aet = ["FEDMED"]
    entity.add_supported_context(FIND)
    entity.add_supported_context(GET)
    for kind in {str(ds.SOPClassUID) for ds in holdings.objects}:
        entity.add_supported_context(kind, ALL_TRANSFER_SYNTAXES, scu_role=True, scp_role=True)
    server = entity.start_server(
        ("127.0.0.1", 0),
        block=False,
        ssl_context=context,
        evt_handlers=[(evt.EVT_C_FIND, holdings.find), (evt.EVT_C_GET, holdings.get)],
    )
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def dimse(address: str, *, called: str = "ARCHIVE", calling: str = "FEDMED", **tls: Path | None) -> Dimse:
    return Dimse(address, called=called, calling=calling, **tls)


@contextmanager
def refusals() -> Iterator[None]:
    """For associations that fail: pynetdicom leaves their sockets to the collector, which here says nothing of it."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        yield
        for thread in threading.enumerate():  # of this side: the archive's may wait for a word for half a minute
            association = thread.assoc if isinstance(thread, DULServiceProvider) else thread
            if isinstance(association, Association) and association.is_requestor:
                thread.join(30)
        gc.collect()


def table_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "pulled.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def everything_in(folder: Path) -> bytes:
    return b"".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file()).lower()
