"""Files that are whole after a crash: written under another name, made durable, then renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, durably: after a crash either the old or the new content is there, whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)  # noqa: PTH105  # one name for every rename, which the kill tests count
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def save_vectors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically and durably."""
    write_atomically(path, save(dict(tensors)))


def append(descriptor: int, content: bytes) -> None:
    """Write at the end of a file and wait until it is on the disk."""
    write_all(descriptor, content)
    os.fsync(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
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
