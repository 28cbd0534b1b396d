"""A process killed just before its Nth write: Linux stops it at every system call, and this decides where it ends.

No copy of the code under test is changed, and nothing is mocked: SQLite's own writes are counted like Python's.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
SYSGOOD, EXITKILL = 1, 1 << 20
ENTRY = 1  # PTRACE_SYSCALL_INFO_ENTRY
# x86-64: write, pwrite64, writev, fsync, fdatasync, ftruncate, rename, link, unlink, mkdir, and the …at calls
CHANGES = {1, 18, 20, 74, 75, 77, 82, 86, 87, 83, 264, 263, 316}
AVAILABLE = sys.platform == "linux" and os.uname().machine == "x86_64"

c_library = ctypes.CDLL(None, use_errno=True)
c_library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
c_library.ptrace.restype = ctypes.c_long


class SyscallInfo(ctypes.Structure):
    """struct ptrace_syscall_info, its entry part."""

    _fields_ = [
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    ]


def run_killed(act: Callable[[], None], at: int | None) -> int:
    """Run `act` in a forked process and kill it just before its write number `at` (from 1).

    Returns:
        How many writes it began; None for `at` counts them all and kills nothing.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            c_library.ptrace(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            act()
            status = 0
        finally:
            os._exit(status)
    os.waitpid(child, 0)
    if c_library.ptrace(SETOPTIONS, child, None, SYSGOOD | EXITKILL) != 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise OSError(ctypes.get_errno(), "ptrace is not allowed here")
    begun, deliver = 0, 0
    while True:
        c_library.ptrace(SYSCALL, child, None, deliver)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            assert at is not None or os.WEXITSTATUS(status) == 0, "the process failed by itself"
            return begun
        deliver = os.WSTOPSIG(status)
        if deliver != signal.SIGTRAP | 0x80:
            continue
        deliver = 0
        info = SyscallInfo()
        c_library.ptrace(GET_SYSCALL_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == ENTRY and info.number in CHANGES:
            begun += 1
            if begun == at:
                os.kill(child, signal.SIGKILL)
