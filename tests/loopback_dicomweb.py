"""A DICOMweb service on loopback that answers as it is told; a real one is in orthanc."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from dicom_files import content_of
from pydicom.dataset import Dataset

from fedmed.imaging.plain_errors import plain_errors

TAGS = {"StudyInstanceUID": "0020000D", "SeriesInstanceUID": "0020000E", "SOPInstanceUID": "00080018"}
LEVELS = ("studies", "series", "instances")
MULTIPART = 'multipart/related; type="application/dicom"; boundary=part'
Wrong = tuple[int, bytes] | tuple[int, bytes, str]  # status, body, and its kind where it is no page


class DicomWebService(ThreadingHTTPServer):
    """Objects, and `wrong`: what to answer instead, by how often a path was asked for; None = what is asked for."""

    daemon_threads = True

    def __init__(self, *objects: Dataset) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.objects = objects
        self.asked: list[str] = []
        self.wrong: Callable[[str, int], Wrong | None] = lambda path, times: None


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, service = parts.path.removeprefix("/"), self.server
        times = service.asked.count(path)
        service.asked.append(path)
        if wrong := service.wrong(path, times):
            self._answer(wrong[0], wrong[1], wrong[2] if len(wrong) == 3 else "text/html")
            return
        words = path.split("/")
        wanted = dict(zip(TAGS, words[1::2], strict=False))
        found = [ds for ds in service.objects if all(str(ds[name].value) == uid for name, uid in wanted.items())]
        if len(words) % 2:  # a search
            first = int(parse_qs(parts.query).get("offset", ["0"])[0])
            most = int(parse_qs(parts.query).get("limit", ["1000"])[0])
            known = list(TAGS)[: LEVELS.index(words[-1]) + 1]
            rows = {tuple(str(ds[name].value) for name in known): ds for ds in found}
            page = [dict(zip(known, row, strict=True)) for row in list(rows)[first : first + most]]
            told = [{TAGS[name]: {"vr": "UI", "Value": [uid]} for name, uid in row.items()} for row in page]
            self._answer(200, json.dumps(told).encode(), "application/dicom+json")
            return
        with plain_errors():
            contents = [content_of(ds) for ds in found]
        bodies = [b"--part\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for content in contents]
        self._answer(200, b"".join(bodies) + b"--part--", MULTIPART)

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def dicomweb_of(service: DicomWebService) -> Iterator[str]:
    """Its URL."""
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{service.server_address[1]}"
    finally:
        service.shutdown()
        service.server_close()
        thread.join()
