"""Rows of a manifest decoded one after the other, in processes whose end is one row's error and not this one's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any

from numpy.typing import NDArray

from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.items import item
from fedmed.imaging.manifest import Row
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.recipe import Recipe

Arrays = dict[str, NDArray[Any]]
Decode = Callable[[Row, Recipe], Arrays]
Outcome = Arrays | UnreadableImage
TIMEOUT_S = 300.0  # for one row: a series of a thousand slices on a slow disk
MEMORY_BYTES = 12 * 2**30  # for one row: a volume of 2 GiB in float32, its mask, and what resampling needs beside them
AHEAD = 2  # rows that each process has waiting, so that none is idle while results are written


@contextmanager
def apart() -> Iterator[Decode]:
    """Decode in another process: a decoder that crashes, hangs or eats memory costs one row."""
    with DecodingProcess(timeout_s=TIMEOUT_S, memory_bytes=MEMORY_BYTES) as process:
        yield lambda row, recipe: process.run("item", **_job(row, recipe))


@contextmanager
def here() -> Iterator[Decode]:
    """Decode in this process: to be put in the place of `apart` for a debugger, or to change how images are read."""

    def decode(row: Row, recipe: Recipe) -> Arrays:
        with plain_errors():
            return item(**_job(row, recipe))

    yield decode


def decoded(rows: Sequence[Row], recipe: Recipe, *, processes: int = 1) -> Generator[Outcome, None, None]:
    """The arrays of every row in order, or why it has none.

    Args:
        rows: of a manifest.
        recipe: how they are read.
        processes: decoding processes; each takes a row at a time.

    Raises:
        DataError: a mask does not fit its image or the task; it names the row.
    """
    if not rows:
        return
    with ExitStack() as stack:
        idle: SimpleQueue[Decode] = SimpleQueue()
        for _ in range(min(processes, len(rows))):
            idle.put(stack.enter_context(apart()))

        def one(row: Row) -> Outcome:
            decode = idle.get()
            try:
                return decode(row, recipe)
            except UnreadableImage as error:
                return error
            except DataError as error:
                text = f"row {row.number}: {error}"
                raise DataError(text, public=text) from None
            finally:
                idle.put(decode)

        if processes == 1:
            yield from map(one, rows)
            return
        pool = ThreadPoolExecutor(processes)  # its threads only wait for the processes
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[Outcome]] = deque()
        for row in rows:
            waiting.append(pool.submit(one, row))
            if len(waiting) >= AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _job(row: Row, recipe: Recipe) -> dict[str, Any]:
    return {"image": str(row.image), "mask": str(row.mask or ""), "recipe": recipe.settings()}
