"""What Flower starts at a site in the place of its own `flwr-clientapp`: hands the task to the warm process and waits.

It runs once for every message, so it imports nothing but what Python brings.
"""

import json
import os
import socket
import sys
import time

SOCKET = "tasks.sock"  # relative: a socket's whole path may not be longer than 107 bytes
AHEAD = "FEDMED_CLOCK_AHEAD_S"  # of the server's, as the SuperNode found it
TRY, HERE = "--try", "this is the door"  # a question that Flower's own programs do not know, and its answer
LOOK_S = 2.0  # between two looks at who started this process
WAIT_S = 60.0  # for a warm process that was killed and is started again; Flower then counts a task as lost


def main(folder: str, arguments: list[str]) -> int:
    """Give the task's arguments away, and its exit status back; 1 if its process was killed.

    Ends when the process that started it is gone. The task ends then too: it sees this end of the socket closed.
    """
    if arguments == [TRY]:
        print(HERE)
        return 0
    parent = os.getppid()
    os.chdir(folder)
    with connected() as server:
        server.sendall(json.dumps([os.environ.get(AHEAD, "0"), *arguments]).encode() + b"\n")
        answer = heard(server, parent)
    if not answer:
        print("a task was killed before it answered", file=sys.stderr, flush=True)
    return int(answer) if answer else 1


def heard(server: socket.socket, parent: int) -> bytes:
    """A line, or nothing if the other end was closed or `parent` is no longer this process's own."""
    server.settimeout(LOOK_S)
    line = b""
    while not line.endswith(b"\n"):
        try:
            piece = server.recv(64)
        except TimeoutError:
            if os.getppid() == parent:
                continue
            piece = b""
        if not piece:
            return b""
        line += piece
    return line


def connected() -> socket.socket:
    """The way to the warm process, waiting for one that is about to come."""
    deadline = time.monotonic() + WAIT_S
    while True:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(SOCKET)
        except (FileNotFoundError, ConnectionRefusedError):
            server.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return server


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
