"""The proxy that stands for a hospital's line, since proofs rest on it."""

import socket
import threading
import time

from proxies import proxy

SIZE, SPEED = 100_000, 200_000  # bytes; bytes/s


def test_all_connections_share_one_line():
    listener = socket.create_server(("127.0.0.1", 0))
    taken = []

    def take() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                taken.append(sum(map(len, iter(lambda c=connection: c.recv(65536), b""))))

    def send(way: int, port: int) -> None:
        with socket.create_connection(("127.0.0.1", way)) as line:
            line.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
            assert line.recv(1000).startswith(b"HTTP/1.1 200")
            line.sendall(bytes(SIZE))

    with listener, proxy() as way:
        way.bytes_per_s = SPEED
        taker = threading.Thread(target=take)
        senders = [threading.Thread(target=send, args=(way.port, listener.getsockname()[1])) for _ in range(2)]
        began = time.monotonic()
        for each in (taker, *senders):
            each.start()
        for each in (taker, *senders):
            each.join(30)
    assert taken == [SIZE, SIZE]
    assert time.monotonic() - began >= 2 * SIZE / SPEED
