"""What is said to hold a task does hold it, and what does not hold is said."""

import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedmed.deployment import confinement
from fedmed.deployment.confinement import Confinement

CONFINE = """
import encodings.idna, json, os, socket, sys  # all that is needed later: a plain user may not read this Python
from pathlib import Path
from fedmed.deployment import confinement
if sys.argv[2] == "user" and os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
if sys.argv[2] == "landlock":
    confinement._own_network = lambda: ""
if sys.argv[2] == "unmapped":  # as under AppArmor: a namespace may be made, and its maps not be written
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    confinement._landlock([Path(sys.argv[1])])
held = confinement.confine(writable=[Path(sys.argv[1])], memory_gib=0, processors=0)
def error(act):
    try:
        act()
        return ""
    except OSError as problem:
        return type(problem).__name__
said = {
    "held": vars(held),
    "connect": error(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), timeout=5)),
    "send": error(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", int(sys.argv[3])))),
    "outside": error(lambda: Path(sys.argv[1]).parent.joinpath("x").write_bytes(b"")),
    "inside": error(lambda: Path(sys.argv[1]).joinpath("x").write_bytes(b"")),
    "uid": os.geteuid(),
}
print(json.dumps(said))
"""


def landlock_version() -> int:
    """Of the kernel, which and not fedmed decides what can be asked of it."""
    return ctypes.CDLL(None, use_errno=True).syscall(444, None, 0, 1) if sys.platform == "linux" else 0


@pytest.mark.skipif(landlock_version() < 4, reason="Landlock refuses TCP from Linux 6.7 on")
@pytest.mark.parametrize(
    "who", ["user", "landlock", pytest.param("unmapped", marks=pytest.mark.skipif(os.geteuid() != 0, reason="as root"))]
)
def test_what_is_said_to_hold_does_hold_for_a_plain_user_and_where_namespaces_are_forbidden(who):
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        inside = Path(folder) / "inside"
        inside.mkdir()
        for place in (inside.parent, inside):
            place.chmod(0o777)  # so that nothing but Landlock refuses
        port = str(listener.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", CONFINE, str(inside), who, port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    held = Confinement(**said["held"])
    assert said["uid"] or who == "landlock" or os.geteuid()
    assert held.network and held.files
    assert said["connect"]
    assert bool(said["send"]) == (held.network == confinement.NO_NETWORK), "Landlock lets UDP pass, a namespace nothing"
    assert (said["outside"], said["inside"]) == ("PermissionError", "")


def test_what_does_not_hold_is_said(tmp_path):
    assert str(Confinement(network="", files="all", memory="1 GiB", processors="1 of 2")).startswith(
        "network: NOT limited, this system does not allow it; files: all"
    )


def test_a_kernel_on_which_any_file_may_be_cut_short_is_named():
    assert [("cut short" in confinement._files(version)) for version in range(1, 5)] == [True, True, False, False]
    assert confinement._files(0) == ""


@pytest.mark.parametrize(
    ("network", "landlock", "gaps"),
    [
        (confinement.NO_NETWORK, 3, ()),
        (confinement.NO_NETWORK, 2, ("files",)),
        (confinement.NO_NETWORK, 0, ("files",)),
        ("TCP refused by Landlock; UDP is not", 4, ("network",)),
        ("", 0, ("network", "files")),
    ],
)
def test_what_holds_in_part_is_a_gap(network, landlock, gaps):
    held = Confinement(network=network, files=confinement._files(landlock), memory="", processors="")
    assert held.gaps == gaps
