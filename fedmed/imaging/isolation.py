"""Decoding in a process of its own: a native decoder's crash, hang or greed is one file's error and not the site's.

The child is started anew (never forked: torch, CUDA and Flower hold threads) and stays for many files. It is asked by
one line of JSON and answers with JSON and the raw bytes of arrays; nothing is pickled in either direction. It cannot
write a core dump, and what native code prints goes nowhere: both would hold pixels and headers.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError, DataError, FedmedError, UnfitRow, UnreadableImage

SIZE = 8  # bytes of the number in front of a reply
START_S = 60.0  # until a new child answers; it needs a third of a second where the disk is warm
MAX_REPLY_BYTES = 16 * 2**30
RAISED: tuple[type[FedmedError], ...] = (UnreadableImage, UnfitRow, DataError, ConfigError)
ERRORS = {error.__name__: error for error in RAISED}

_open: weakref.WeakSet[DecodingProcess] = weakref.WeakSet()


class DecodingProcess:
    """A child that runs decoding jobs, one at a time, and is replaced when it dies.

    Usable from several threads, which then wait for one another. A forked copy of the owner starts a child of its own.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 30.0,
        memory_bytes: int = 4 * 2**30,
        jobs: str = "fedmed.imaging.decode_child",
    ) -> None:
        """Start nothing yet: the first job does.

        Args:
            timeout_s: seconds that one job may take; then the child is killed.
            memory_bytes: that the child may have beyond what it needs to start.
            jobs: the module whose JOBS are run.
        """
        self._timeout_s, self._memory_bytes, self._jobs = timeout_s, memory_bytes, jobs
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        _open.add(self)

    def __enter__(self) -> DecodingProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, job: str, **settings: Any) -> dict[str, NDArray[Any]]:
        """Run a job in the child.

        Args:
            job: a key of the child's JOBS.
            settings: its arguments: whatever JSON holds; paths as strings.

        Returns:
            The arrays that the job gave, by name.

        Raises:
            UnreadableImage: the job said so, or the child crashed, hung or took too much memory on this file.
            DataError, ConfigError: the job said so.
        """
        request = json.dumps({"job": job, "settings": settings}).encode() + b"\n"
        with self._lock:
            try:
                child = self._started()
                deadline = time.monotonic() + self._timeout_s
                child.stdin.write(request)  # type: ignore[union-attr]  # piped when it was started
                child.stdin.flush()  # type: ignore[union-attr]  # piped when it was started
                header = self._header(child, deadline)
                return {name: self._array(child, deadline, *form) for name, *form in header.get("arrays", [])}
            except TimeoutError:
                self._kill()
                raise UnreadableImage(f"its decoder did not end within {self._timeout_s:g} s") from None
            except (EOFError, OSError):
                self._kill()
                raise UnreadableImage("its decoder crashed") from None
            except BaseException as error:
                if not isinstance(error, FedmedError):  # interrupted in mid-reply: the rest of it would be taken for
                    self._kill()  # the next one
                raise

    def close(self) -> None:
        """End the child. A later job would start a new one."""
        with self._lock:
            self._kill()

    def __del__(self) -> None:
        self._kill()

    @property
    def pid(self) -> int | None:
        """Of the child, if there is one."""
        return None if self._child is None else self._child.pid

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._kill()
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._child = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "fedmed.imaging.decode_child",
                self._jobs,
                str(self._memory_bytes),
                str(math.ceil(self._timeout_s) + 5),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            self._header(self._child, time.monotonic() + START_S)
        except (TimeoutError, EOFError, OSError):
            self._kill()
            raise DataError("the decoding process does not start", public="images cannot be decoded") from None
        return self._child

    def _header(self, child: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        """A reply's JSON, or the error that it stands for."""
        length = int.from_bytes(_read(child, SIZE, deadline))
        if length > MAX_REPLY_BYTES:
            raise EOFError
        header: dict[str, Any] = json.loads(_read(child, length, deadline))
        if "error" in header:
            raise ERRORS.get(header["error"], UnreadableImage)(header["message"], public=header["public"])
        return header

    def _array(self, child: subprocess.Popen[bytes], deadline: float, kind: str, shape: Sequence[int]) -> NDArray[Any]:
        form = np.dtype(kind)
        if form.kind not in "biuf" or form.itemsize * math.prod(shape) > MAX_REPLY_BYTES:
            raise EOFError
        return np.frombuffer(_read(child, form.itemsize * math.prod(shape), deadline), form).reshape(shape)

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        _shut(child)

    def _forget(self) -> None:
        """In a forked copy of the owner: the child is not ours, and our ends of its pipes would keep it alive."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            _shut(child)
            child.returncode = 0  # nobody here may wait for it


def _read(child: subprocess.Popen[bytes], size: int, deadline: float) -> bytearray:
    """Exactly `size` bytes. Raises TimeoutError after the deadline, EOFError if the child ends before."""
    pipe = child.stdout.fileno()  # type: ignore[union-attr]  # piped when it was started
    buffer = bytearray(size)
    rest = memoryview(buffer)
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    while rest:
        left_ms = (deadline - time.monotonic()) * 1000
        if left_ms <= 0 or not waiting.poll(left_ms):
            raise TimeoutError
        count = os.readv(pipe, [rest])
        if count == 0:
            raise EOFError
        rest = rest[count:]
    return buffer


def _shut(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):  # a request that the dead child never took is still in the buffer
            pipe.close()  # type: ignore[union-attr]  # piped when it was started


def _close_all() -> None:
    for process in list(_open):
        process.close()


def _forget_all() -> None:
    for process in list(_open):
        process._forget()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
