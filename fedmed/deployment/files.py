"""Files of a deployment: secrets that only their owner reads, what others sent, and whether a folder changed."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmed import durable
from fedmed.errors import ConfigError

SECRET, OPEN = 0o600, 0o644
LONGEST = 1 << 20  # bytes of a card or a kit; what is longer is neither


def write_new(path: Path, content: bytes, mode: int = OPEN) -> None:
    """Write a file that must not exist yet, with its mode from the first byte on; on disk when this returns.

    Raises:
        ConfigError: it exists.
    """
    try:
        durable.write_new(path, content, mode=mode)
    except FileExistsError:
        raise ConfigError(f"{path} exists; nothing is overwritten") from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a file that somebody sent.

    Args:
        path: the file.
        what: it should be, for the error.

    Raises:
        ConfigError: it cannot be read or holds no JSON object.
    """
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError("too long")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: no {what} can be read there ({error.strerror})") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: this is no {what}, or it was damaged on its way; ask for it again")
    return values


def stamps(folder: Path, names: str) -> list[tuple[str, int]]:
    """Names and times of the files that match a pattern: another answer means that the folder changed."""
    found = []
    for path in folder.glob(names):
        with suppress(OSError):  # removed while we looked
            found.append((path.name, path.stat().st_mtime_ns))
    return sorted(found)
