"""The child of `isolation.DecodingProcess`: reads one request a line, runs its job, writes the arrays.

Only the standard library is imported at the top; a job imports what it needs when it is first asked for. The child
ends when its input ends, when a job takes too long for the parent to be still alive, or by its own crash.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

Arrays = dict[str, Any]


def item(image: str | list[str], mask: str, recipe: dict[str, Any]) -> Arrays:
    """One row of a manifest as it is kept: `images`, and `masks` if there is one (see `items`)."""
    from fedmed.imaging.items import item as decoded  # heavy

    return decoded(image=image, mask=mask, recipe=recipe)


def fingerprints(path: str) -> Arrays:
    """Of one image: `fingerprints` (n, 32) bytes (see `fingerprints`)."""
    from fedmed.imaging import fingerprints as taken  # heavy

    return {"fingerprints": taken.fingerprints(Path(path))}


JOBS: dict[str, Callable[..., Arrays]] = {"item": item, "fingerprints": fingerprints}


def main(jobs: str, memory_bytes: int, alarm_s: int) -> None:
    """Answer requests until input ends.

    Args:
        jobs: the module whose JOBS are run.
        memory_bytes: that may be allocated beyond what start-up took.
        alarm_s: seconds after which a job is ended by the kernel, should the parent be gone and kill nobody.
    """
    replies = _quiet_stdout()
    table = importlib.import_module(jobs).JOBS
    _limit(memory_bytes)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    _send(replies, {"arrays": []}, {})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.alarm(alarm_s)
        header, arrays = _answer(table, request["job"], request["settings"])
        _send(replies, header, arrays)
        signal.alarm(0)


def _answer(
    table: dict[str, Callable[..., Arrays]], job: str, settings: dict[str, Any]
) -> tuple[dict[str, Any], Arrays]:
    from fedmed.errors import FedmedError
    from fedmed.imaging.plain_errors import plain_errors  # heavy

    try:
        with plain_errors():
            arrays = table[job](**settings)
    except FedmedError as error:
        return {"error": type(error).__name__, "message": str(error), "public": error.public}, {}
    return {"arrays": [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]}, arrays


def _send(replies: BinaryIO, header: dict[str, Any], arrays: Arrays) -> None:
    text = json.dumps(header).encode()
    replies.write(len(text).to_bytes(8) + text)
    for array in arrays.values():
        if array.size:
            replies.write((array if array.flags.c_contiguous else array.copy()).reshape(-1).view("u1").data)
    replies.flush()


def _quiet_stdout() -> BinaryIO:
    """The reply pipe, kept apart from file descriptors 1 and 2, onto which native decoders print."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return replies


def _limit(memory_bytes: int) -> None:
    """No core dump, which would hold pixels; no more data than allowed (RLIMIT_DATA counts every private mapping)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError, IndexError):  # no /proc, no limit
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
