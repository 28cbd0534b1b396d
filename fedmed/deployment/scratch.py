"""Where tasks at a site keep what lives no longer than they do, and what is done with what is left of those killed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmed.deployment.site_folder import SiteFolder
from fedmed.durable import make_private


def scratch(site: SiteFolder) -> Path:
    """The folder of temporary files of a site's tasks, made if it is not there."""
    return make_private(site.flower / "tmp")


def clear_scratch(site: SiteFolder) -> None:
    """Remove what killed tasks and dry rounds left, pixels and patients' ids among it. No task may run yet.

    A dry round that is under way needs its files: then all stays until the next time.
    """
    folder = scratch(site)
    with folder_lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
        for left in folder.iterdir() if alone else ():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


@contextmanager
def in_use(site: SiteFolder) -> Iterator[Path]:
    """The folder, which nobody clears meanwhile."""
    with folder_lock(scratch(site), fcntl.LOCK_SH):
        yield scratch(site)


@contextmanager
def folder_lock(folder: Path, how: int) -> Iterator[bool]:
    """Hold a lock on a folder (flock(2)), which ends with the process; gives whether it could be had."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
