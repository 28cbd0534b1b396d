"""Which fedmed this is, so that two sides with different code refuse each other."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import fedmed


@cache
def package_hash() -> str:
    """SHA-256 over the names and contents of the installed package's Python files.

    A wheel also carries the Flower app as data (`_app`), which no checkout has there; it does not count.
    """
    root = Path(fedmed.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*.py") if "_app" not in path.parts):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions that a result records."""
    packages = ("flwr", "torch", "torchvision", "numpy", "pydicom")
    return {"fedmed": fedmed.__version__} | {name: version(name) for name in packages}
