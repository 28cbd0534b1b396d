"""What an archive must be able to do, whichever protocol it speaks, and patience with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from pydicom.dataset import Dataset

from fedmed.errors import DataError
from fedmed.intake.query import Query, Series

ATTEMPTS = 5

Answer = TypeVar("Answer")


class Interrupted(DataError):
    """An archive did not answer, or broke off. Asking again may help."""


class Archive(Protocol):
    """A PACS or a vendor-neutral archive."""

    def find(self, query: Query) -> Iterator[Series]:
        """Series of the studies that meet a query's study-level conditions."""

    def objects(self, series: Series) -> list[str]:
        """The SOP Instance UIDs of a series."""

    def fetch(self, series: Series, take: Callable[[Dataset], None]) -> None:
        """Read a whole series, object by object."""

    def fetch_object(self, series: Series, uid: str, take: Callable[[Dataset], None]) -> None:
        """Read one object."""


def patiently(ask: Callable[[int], Answer], *, wait_s: float) -> Answer:
    """The answer to a question that is repeated while the archive is interrupted, after 1, 2, 4 and 8 times a wait.

    Args:
        ask: called with the number of the attempt, from 0.
        wait_s: the first wait, seconds.

    Raises:
        Interrupted: by the last attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return ask(attempt)
        except Interrupted:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(wait_s * 2**attempt)
    raise AssertionError("unreachable")
