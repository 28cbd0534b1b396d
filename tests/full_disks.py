"""Disks with something wrong: on one a file of 4 KiB is the largest that fits; others are mounted as a test wants."""

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

UNSHARE = ("unshare", "-rm")
_TRY = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
MOUNTS = shutil.which("unshare") is not None and subprocess.run(_TRY, capture_output=True, check=False).returncode == 0
NO_MOUNT = "a disk of its own needs a private mount, which this machine does not allow"
needs_mount = pytest.mark.skipif(not MOUNTS, reason=NO_MOUNT)


def mounted(folder: Path, options: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees an empty disk in the place of a folder."""
    folder.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} none {folder} && exec "$@"'
    return subprocess.run(
        [*UNSHARE, "sh", "-c", script, "sh", *words], capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def full_disk() -> Iterator[None]:
    """Writes of this process fail when half of them is done."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
