"""A hospital's CONNECT proxy on loopback, with a password if wanted; it can be cut, and be slow."""

import base64
import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

PIECE = 16_384  # bytes


class Proxy(socketserver.ThreadingTCPServer):
    """What it was asked for, and how it lets bytes through."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, login: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.login = login
        self.asked: list[tuple[str, bool]] = []  # (HOST:PORT, let through)
        self.bytes_per_s = 0  # of all connections together, both ways; 0 = as fast as it goes
        self._free_at, self._turn = 0.0, threading.Lock()
        self.cut = threading.Event()  # nothing passes while it is set
        self.passed = 0

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def wait_for_room(self, size: int) -> None:
        """Return when so many bytes may pass: one line for all connections, as a hospital's is."""
        if not self.bytes_per_s:
            return
        with self._turn:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_s
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))

    def url(self, login: str = "") -> str:
        return f"http://{login}@127.0.0.1:{self.port}" if login else f"http://127.0.0.1:{self.port}"


class Tunnel(socketserver.StreamRequestHandler):
    """One connection: CONNECT HOST:PORT, then bytes both ways."""

    server: Proxy

    def handle(self) -> None:
        words = self.rfile.readline().decode().split()
        lines = list(iter(self.rfile.readline, b"\r\n"))
        known = base64.b64encode(self.server.login.encode())
        let = not self.server.login or any(line.strip().endswith(b" " + known) for line in lines)
        self.server.asked.append((words[1], let))
        while self.server.cut.is_set():
            time.sleep(0.05)
        if words[0] != "CONNECT" or not let:
            self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        host, _, port = words[1].rpartition(":")
        with contextlib.suppress(OSError), reached((host, "127.0.0.1"), int(port)) as far:
            far.settimeout(None)
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self.pump, args=(far, self.connection), daemon=True)
            back.start()
            self.pump(self.connection, far)
            back.join()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                while self.server.cut.is_set():
                    time.sleep(0.05)
                self.server.wait_for_room(len(piece))
                target.sendall(piece)
                self.server.passed += len(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def reached(hosts: tuple[str, ...], port: int) -> socket.socket:
    """A connection to the first that answers."""
    for host in hosts:
        with contextlib.suppress(OSError):
            return socket.create_connection((host, port), timeout=10)
    raise OSError


@contextlib.contextmanager
def proxy(login: str = "") -> Iterator[Proxy]:
    with Proxy(login) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
