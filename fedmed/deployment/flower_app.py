"""The Flower app that a run is submitted with: two files of one assignment each, from the wheel or a checkout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fedmed
from fedmed.errors import ConfigError


def app_folder() -> Path:
    """Where the app's pyproject.toml lies: `fedmed/_app` of a wheel, or the root of a checkout.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(fedmed.__file__).parent
    for folder in (package / "_app", package.parent):
        if (folder / "pyproject.toml").exists() and (folder / "client" / "app.py").exists():
            return folder
    raise ConfigError("this fedmed was installed without its Flower app; install it from its wheel or a checkout")


def build_app(folder: Path | None = None) -> bytes:
    """The app as Flower packs it; equal files give equal bytes.

    Wheel and checkout, `fedmed server submit` and `flwr run .` give the same bytes, so that one hash stands for all.

    Args:
        folder: of the app; else that of this fedmed.
    """
    from flwr.cli.build import build_fab_from_files

    folder = folder or app_folder()
    names = ["pyproject.toml", *(f"{side}/{name}.py" for side in ("server", "client") for name in ("__init__", "app"))]
    content, _ = build_fab_from_files({name: (folder / name).read_bytes() for name in names})
    return content


def app_hash() -> str:
    """SHA-256 of the app that this fedmed submits, which is what a site receives."""
    return hashlib.sha256(build_app()).hexdigest()
