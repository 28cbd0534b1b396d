"""Files that are whole after a crash: written under another name, made durable, then renamed. Digests and modes too."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DIGEST = re.compile(r"[0-9a-f]{64}")  # SHA-256 as `sha256_of` writes it
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # what a file system without hard links says


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644, shared: bool = False) -> None:
    """Replace a file by new content, durably; arguments as of `replacing`."""
    with replacing(path, mode=mode, shared=shared) as descriptor:
        write_all(descriptor, content)


def write_json(path: Path, value: Mapping[str, Any], *, mode: int = 0o644) -> None:
    """Replace a file by a value as JSON that people read; NaN is an error."""
    write_atomically(path, json.dumps(dict(value), indent=2, allow_nan=False).encode() + b"\n", mode=mode)


@contextmanager
def replacing(path: Path, *, mode: int = 0o644, shared: bool = False) -> Iterator[int]:
    """A descriptor to write to, whose file takes the name `path` at the end.

    After a crash or an error the old file is there, or the new one whole. An error leaves nothing else behind; what a
    crash leaves is removed by the next to write this file.

    Args:
        path: in a folder that exists.
        mode: of the new file, from before its first byte.
        shared: other processes may write this file at the same moment. What a crash leaves then stays, `.*.partial`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # for it may have another mode
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)  # noqa: PTH105  # one name for every rename, which the kill tests count
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is to be removed
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_new(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file that must not exist yet; it and its name are on disk when this returns.

    After a crash it is whole or not there; what a crash leaves besides is `.*.partial`.

    Raises:
        FileExistsError: it exists.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        try:
            append(descriptor, content)
        finally:
            os.close(descriptor)
        _take_name(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _take_name(partial: Path, path: Path) -> None:
    """Give a whole file a name that must be free. A rename would replace what has it; a link replaces nothing.

    Where there are no hard links (FAT, some mounts) the name is taken by an empty file first.
    """
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(partial, path)  # noqa: PTH105  # one name for every rename, which the kill tests count


def append(descriptor: int, content: bytes | memoryview) -> None:
    """Write at the end of a file and wait until it is on the disk."""
    write_all(descriptor, content)
    os.fsync(descriptor)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content`; the system may take less at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename alone may be forgotten when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(folder: Path) -> Path:
    """A folder and those above it that are missing, for the owner alone; `parents=True` would open those above."""
    for one in (*reversed(folder.parents), folder):
        if not one.is_dir():
            one.mkdir(mode=0o700, exist_ok=True)
    return folder


def sha256_of(path: Path) -> str:
    """Of a file's content, hexadecimal; the file is not read into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_to_others(path: Path) -> bool:
    """Whether others than its owner may read or write a file, or run it."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
