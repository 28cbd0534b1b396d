"""What a server is not told of a failure at a site: that memory failed, and where, can tell of a patient."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

from fedmed.errors import DataError, FedmedError
from fedmed.training.site import Site, settings_from
from fedmed.types import Task

Answer = TypeVar("Answer")
UNFORESEEN = "the task failed at the site; its own log says where"


def one_reason(act: Callable[[Task, Site], Answer]) -> Callable[[Task, Site], Answer]:
    """Have a task of a private run give one and the same reason for every failure that fedmed did not foresee.

    At a real site the task then raises `DataError` in place of what was no `FedmedError`, but for the errors of the
    operating system, which tell of the disk.
    """

    @wraps(act)
    def told(task: Task, site: Site) -> Answer:
        try:
            return act(task, site)
        except (FedmedError, OSError):
            raise
        except Exception as error:
            if site.virtual or settings_from(task.settings).privacy.mode == "none":
                raise
            _say(error)
            raise DataError(f"{type(error).__name__}; its place stands above", public=UNFORESEEN) from error

    return told


@contextmanager
def for_the_site_alone(site: Site) -> Iterator[None]:
    """Let what is written for the hospital alone fail, with a line in its own log and no word to the server.

    In a simulation only a full disk and what fedmed itself says may: anything else is a defect to be seen.
    """
    try:
        yield
    except Exception as error:  # a full disk, no memory, a network that gives NaN for some patient
        if not site.virtual:
            _say(error)
        elif not isinstance(error, OSError | FedmedError):
            raise


def _say(error: Exception) -> None:
    """Kind and place, and never the text, which may hold anything."""
    print(f"warning: {type(error).__name__} in a task", file=sys.stderr, flush=True)
    traceback.print_tb(error.__traceback__)
