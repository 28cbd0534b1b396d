"""Flower's launcher of tasks, `flower-superexec`: a SuperNode or a SuperLink starts it once, and never looks again."""

from __future__ import annotations

from pathlib import Path

from fedmed.deployment.processes import descendants

LAUNCHER = "flower-superexec"
LOOKS = 3  # in a row; a list of children may miss one while another ends (proc(5))


class Launcher:
    """Whether the launcher below a process still runs; without it no task is ever started again."""

    def __init__(self, pid: int) -> None:
        """Of the SuperNode's or SuperLink's process, which may not have started it yet."""
        self._pid, self._seen, self._missed = pid, False, 0

    def gone(self) -> bool:
        """Look; whether it was there, and was missed several times in a row. Never where /proc is not there."""
        there = any(LAUNCHER.encode() in _words(pid) for pid in descendants(self._pid))
        self._seen |= there
        self._missed = 0 if there else self._missed + 1
        return self._seen and self._missed >= LOOKS


def _words(pid: int) -> bytes:
    """A process's command line, empty if it is a zombie; the launcher's name where /proc hides it.

    The launcher makes itself undumpable, so /proc mounted with hidepid=2 hides it from its own user, dead or alive.
    There this look finds nothing gone, and restarts nothing that is well.
    """
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return LAUNCHER.encode()
