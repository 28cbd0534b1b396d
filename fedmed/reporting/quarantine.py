"""The page of what is in quarantine. It shows pictures of patients, perhaps with their names, and stays at the site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmed.reporting.pages import fill, write_page

MODE = 0o600  # it shows patients


def write_quarantine(
    objects: Sequence[tuple[int, str, Sequence[str]]], target: Path, *, command: str, left: int
) -> Path:
    """Write the page, readable by its owner alone.

    Args:
        objects: (row of quarantine.csv, reason, pictures as data URIs) of each.
        target: the file.
        command: that shows, releases and deletes them.
        left: further objects in quarantine, which are not on this page.

    Raises:
        DataError: it cannot be written.
    """
    page = fill("quarantine.html.j2", objects=objects, command=command, left=left)
    return write_page(page, target, mode=MODE)
