"""A party in the middle of a TLS connection, with the server's own key: what passes is kept before it is encrypted."""

import base64
import contextlib
import select
import socket
import ssl
import threading
from pathlib import Path


class Recorder:
    """Listens on a port of loopback with a server's certificate, and passes everything on to another port."""

    def __init__(self, tls: Path, port: int, onward: int) -> None:
        self._outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._outside.load_cert_chain(tls / "server.crt", tls / "server.key")
        self._inside = ssl.create_default_context(cafile=str(tls / "ca.crt"))
        self._onward = onward
        self._streams: list[bytearray] = []
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def streams(self) -> list[bytes]:
        """All that passed: two streams a connection, one each way."""
        return [bytes(stream) for stream in self._streams]

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain, self._outside.wrap_socket(plain, server_side=True) as outside:
            onward = socket.create_connection(("127.0.0.1", self._onward))
            with self._inside.wrap_socket(onward, server_hostname="localhost") as inside:
                self._pass(outside, inside)

    def _pass(self, one: ssl.SSLSocket, other: ssl.SSLSocket) -> None:
        """Both ways in one thread: a TLS connection is not for two at once before Python 3.13."""
        kept = {one: bytearray(), other: bytearray()}
        self._streams += kept.values()
        while True:
            for source, target in ((one, other), (other, one)):
                source.settimeout(0)
                with contextlib.suppress(ssl.SSLWantReadError):
                    while True:
                        piece = source.recv(65536)
                        if not piece:
                            return
                        kept[source] += piece
                        target.settimeout(None)
                        target.sendall(piece)
            select.select((one, other), (), ())


def spellings(text: str) -> list[bytes]:
    """A text as it may stand in a message: plain, in UTF-16, in hexadecimal, and in base64 at any place."""
    plain = text.encode()
    return [
        plain,
        text.encode("utf-16-le"),
        plain.hex().encode(),
        *(base64.b64encode(b"\0" * start + plain)[4 if start else 0 : -4] for start in range(3)),
    ]
