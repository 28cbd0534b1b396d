"""What the kernel keeps a task from: the network, writing outside its folders, more memory or cores than given.

Everything here needs no privilege and works on the calling process, which must have one thread:

* network: a network namespace of its own (namespaces(7)), in which there is nothing, not even loopback. Where the
  system forbids it to users, Landlock refuses TCP (Linux 6.7).
* files: Landlock (Linux 5.13, landlock(7)) refuses writing everywhere but below named folders; truncate(2) only since
  Linux 6.2. Reading stays.
* memory: RLIMIT_DATA (Linux 4.7), which counts what a process has for itself and not what it shares.
* processors: an affinity, which threads and children inherit.

Landlock is called through ctypes: the C library has no functions for its three system calls.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
VERSION, PATH_BENEATH = 1, 1
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))  # REMOVE_DIR … MAKE_SYM
REFER = 1 << 13
BIND_TCP, CONNECT_TCP = 1, 2
ABSTRACT_SOCKETS, SIGNALS = 1, 2
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
CAPABILITIES_3 = 0x20080522
NO_NETWORK = "none, a namespace of its own"
OWN_FILES = "written only below its own folders (Landlock)"
DEVICES = ("null", "shm", "nvidia*", "kfd", "dri")  # what torch opens for writing


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What holds for a process; each is a few words for people, and "" where the system does not allow it."""

    network: str
    files: str
    memory: str
    processors: str

    @property
    def gaps(self) -> tuple[str, ...]:
        """Which of network and files it is not wholly kept from."""
        whole = {"network": NO_NETWORK, "files": OWN_FILES}
        return tuple(what for what, words in whole.items() if vars(self)[what] != words)

    def __str__(self) -> str:
        """One line; what does not hold is named too."""
        words = {"network": self.network, "files": self.files, "memory": self.memory, "processors": self.processors}
        return "; ".join(
            f"{what}: {held or 'NOT limited, this system does not allow it'}" for what, held in words.items()
        )


def confine(*, writable: Iterable[Path], memory_gib: float, processors: int) -> Confinement:
    """Confine this process and all that it starts, as far as the system allows. It cannot be undone.

    Args:
        writable: folders, which must exist, below which it may write.
        memory_gib: of its own, at most; 0 = no limit.
        processors: that it may use, at most; 0 = all.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold pixels
    if sys.platform != "linux":
        return Confinement(network="", files="", memory="" if memory_gib else "no limit asked for", processors="")
    network = _own_network()
    landlock = _landlock(writable)
    if not network and landlock >= 4:
        network = "TCP refused by Landlock; UDP is not"
    return Confinement(
        network=network,
        files=_files(landlock),
        memory=_memory(memory_gib),
        processors=_processors(processors),
    )


def _own_network() -> str:
    """Leave every network; "" if the system does not allow it."""
    c_library = ctypes.CDLL(None, use_errno=True)
    if c_library.unshare(CLONE_NEWNET) == 0:  # as root
        return NO_NETWORK
    user, group = os.geteuid(), os.getegid()
    if c_library.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return ""
    c_library.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self is root's, and its parent cannot watch it
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with suppress(OSError):  # AppArmor may forbid it (Ubuntu 24.04); the network is gone all the same
            Path(f"/proc/self/{name}").write_text(text)
    # In a user namespace a process has every capability over what belongs to it, and that it does not need.
    c_library.capset(struct.pack("=II", CAPABILITIES_3, 0), bytes(24))
    return NO_NETWORK


def _files(landlock: int) -> str:
    if 0 < landlock < 3:
        return f"{OWN_FILES}; but any may be cut short, before Linux 6.2"
    return OWN_FILES if landlock else ""


def _landlock(writable: Iterable[Path]) -> int:
    """Refuse writing elsewhere; gives Landlock's version, 0 if this kernel has none or does not use it."""
    system = ctypes.CDLL(None, use_errno=True).syscall
    version = int(system(CREATE_RULESET, None, 0, VERSION))
    if version < 1:
        return 0
    files = WRITE_FILE | MAKE_AND_REMOVE | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    network = BIND_TCP | CONNECT_TCP if version >= 4 else 0
    scoped = ABSTRACT_SOCKETS | SIGNALS if version >= 6 else 0
    attributes = struct.pack("=QQQ", files, network, scoped)[: 8 * (1 + (version >= 4) + (version >= 6))]
    rules = int(system(CREATE_RULESET, attributes, len(attributes), 0))
    if rules < 0:
        return 0
    devices = [path for name in DEVICES for path in Path("/dev").glob(name)]
    for path in [*writable, *devices]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = files if path.is_dir() else files & (WRITE_FILE | TRUNCATE)
        added = system(ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
        if added != 0:
            return 0
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held = system(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return version if held else 0


def _memory(gib: float) -> str:
    if not gib:
        return "no limit asked for"
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    size = int(gib * 2**30) if hard == resource.RLIM_INFINITY else min(int(gib * 2**30), hard)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    return f"{size / 2**30:g} GiB of its own"


def _processors(count: int) -> str:
    there = sorted(os.sched_getaffinity(0))
    if not count:
        return "no limit asked for"
    os.sched_setaffinity(0, there[:count])
    return f"{min(count, len(there))} of {len(there)}"
