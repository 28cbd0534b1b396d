"""What Flower starts at a site in the place of its own `flwr-clientapp`: hands the task to the warm process and waits.

It runs once for every message, so it imports nothing but what Python brings.
"""

import json
import os
import socket
import sys

SOCKET = "tasks.sock"  # relative: a socket's whole path may not be longer than 107 bytes


def main(folder: str, arguments: list[str]) -> int:
    """Give the task's arguments away, and its exit status back; 1 if its process was killed."""
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(SOCKET)
        server.sendall(json.dumps(arguments).encode() + b"\n")
        answer = server.makefile("r").readline()
    if not answer:
        print("a task was killed before it answered", file=sys.stderr, flush=True)
    return int(answer) if answer else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
