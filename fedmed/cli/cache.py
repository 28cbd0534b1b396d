"""What `fedmed data cache` does and prints."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from fedmed.cli.display import console
from fedmed.errors import DataError
from fedmed.imaging.cache import cache_folder
from fedmed.imaging.cache.index import Index
from fedmed.imaging.cache.upkeep import FOLDER, KeptSet, damaged, keep_within, kept_sets, segment_sizes

GIB = 2**30


def show_cache(folder: Path | None, *, keep_gib: float | None, verify: bool, as_json: bool) -> None:
    """Check, shrink and show a cache.

    Args:
        folder: a cache folder; None = the one of simulations.
        keep_gib: to shrink it to; None = leave it.
        verify: read everything, and remove what is damaged.
        as_json: print JSON instead of a table.

    Raises:
        DataError: the cache cannot be read.
    """
    kept_in = (folder or cache_folder()) / FOLDER
    found: list[KeptSet] = []
    wrong, size = 0, 0
    if kept_in.is_dir():
        try:
            with closing(Index(kept_in)) as index:
                wrong = damaged(kept_in, index) if verify else 0
                if keep_gib is not None:
                    keep_within(kept_in, index, keep_gib * GIB)
                found, size = kept_sets(kept_in, index), sum(segment_sizes(kept_in).values())
        except sqlite3.Error as error:
            raise DataError(f"the image cache cannot be read ({error}); what it holds can be deleted") from None
    if as_json:
        print(json.dumps(_facts(found, size, wrong if verify else None)))
        return
    if verify:
        print(f"{wrong} damaged segments removed" if wrong else "nothing is damaged", file=sys.stderr)
    _print(found, size)


def _facts(found: list[KeptSet], size: int, wrong: int | None) -> dict[str, object]:
    sets = [
        {**kept.recipe.settings(), "rows": kept.rows, "bytes": kept.bytes, "last_used": _time(kept.used)}
        for kept in found
    ]
    return {"bytes": size, "sets": sets} | ({} if wrong is None else {"damaged_removed": wrong})


def _print(found: list[KeptSet], size: int) -> None:
    if not found:
        print("no decoded images are kept")
        return
    table = Table("read as", "rows", "MiB", "last used", box=None, pad_edge=False)
    for column in (1, 2):
        table.columns[column].justify = "right"
    for kept in found:
        table.add_row(kept.recipe.described(), str(kept.rows), f"{kept.bytes / 2**20:.1f}", _time(kept.used))
    table.add_section()
    table.add_row("all", str(sum(kept.rows for kept in found)), f"{size / 2**20:.1f}", "")
    console().print(table)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
