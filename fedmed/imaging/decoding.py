"""Rows of a manifest decoded one after the other, in processes whose end is one row's error and not this one's."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from fedmed.errors import UnfitRow, UnreadableImage
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.items import item
from fedmed.imaging.manifest import Row
from fedmed.imaging.ordered import in_order
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.recipe import Recipe

Arrays = dict[str, NDArray[Any]]
Decode = Callable[[Row], Arrays]
Outcome = Arrays | UnreadableImage | UnfitRow
# For a row of volumes: a series of a thousand slices on a slow disk, and 2 GiB of float32 with its mask and what
# resampling needs beside them. A picture has the process's own limits.
VOLUME_TIMEOUT_S = 300.0
VOLUME_BYTES = 12 * 2**30
AHEAD = 2  # rows that each process has waiting, so that none is idle while results are written


@contextmanager
def apart(recipe: Recipe) -> Iterator[Decode]:
    """Decode in another process: a decoder that crashes, hangs or eats memory costs one row."""
    limits: dict[str, Any] = {}
    if recipe.items != "images":
        limits = {"timeout_s": VOLUME_TIMEOUT_S, "memory_bytes": VOLUME_BYTES}
    with DecodingProcess(**limits) as process:
        yield lambda row: process.run("item", **_job(row, recipe))


@contextmanager
def here(recipe: Recipe) -> Iterator[Decode]:
    """Decode in this process: to be put in the place of `apart` for a debugger, or to change how images are read."""

    def decode(row: Row) -> Arrays:
        with plain_errors():
            return item(**_job(row, recipe))

    yield decode


def decoded(rows: Sequence[Row], recipe: Recipe, *, processes: int = 1) -> Generator[Outcome, None, None]:
    """The arrays of every row in order, or why it has none; of a row that does not fit the task the error names it.

    Args:
        rows: of a manifest.
        recipe: how they are read.
        processes: decoding processes; each takes a row at a time.

    Raises:
        DataError: the decoding process does not start.
    """

    def one(decode: Decode, row: Row) -> Outcome:
        try:
            return decode(row)
        except UnreadableImage as error:
            return error
        except UnfitRow as error:
            return UnfitRow.told(f"row {row.number}: {error}")

    yield from in_order(rows, one, lambda: apart(recipe), processes=processes, ahead=AHEAD)


def _job(row: Row, recipe: Recipe) -> dict[str, Any]:
    files = ["" if image is None else str(image) for image in row.modalities]
    image = files[0] if len(files) == 1 else files
    return {"image": image, "mask": str(row.mask or ""), "recipe": recipe.settings()}
