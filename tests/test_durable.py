"""Files that are replaced whole or not at all: full disks, modes, kills' leftovers, two writers at once."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from full_disks import full_disk
from kill_points import AVAILABLE, run_killed

from fedmed import durable
from fedmed.errors import DataError, plain_reason
from fedmed.intake.opt_out import remember
from fedmed.privacy.keys import make_keys
from fedmed.reporting.pages import write_page
from fedmed.training.site_state import write_durably

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "of disk /data/P17", "/data/P17"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/P17"), "Permission denied"),
        (OSError("/data/P17 is gone"), "OSError"),
        (FileNotFoundError(), "FileNotFoundError"),
    ],
)
def test_the_plain_reason_of_an_error_is_the_systems_and_names_no_file(error, said):
    assert plain_reason(error) == said


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda path: durable.write_atomically(path, b"x" * 9000), OSError),
        (lambda path: durable.write_atomically(path, b"x" * 9000, mode=0o600, shared=True), OSError),
        (lambda path: durable.write_json(path, {"long": "x" * 9000}), OSError),
        (lambda path: write_page("x" * 9000, path), DataError),
        (lambda path: remember(frozenset(f"P{'A' * 14}{a}{b}" for a in LETTERS for b in LETTERS), path), OSError),
        (lambda path: write_durably(path, {"many": np.zeros(9000)}, {}), DataError),
    ],
    ids=["atomic", "shared", "json", "page", "opt-out", "state"],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_half_written(tmp_path, write, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(error):
        write(path)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_new_file_that_cannot_be_written_whole_is_not_there(tmp_path):
    with full_disk(), pytest.raises(OSError, match="large"):
        durable.write_new(tmp_path / "new", b"x" * 9000)
    assert not names_in(tmp_path)


def test_a_new_file_never_replaces_one(tmp_path):
    durable.write_new(tmp_path / "new", b"first")
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "new", b"second")
    assert (tmp_path / "new").read_bytes() == b"first"
    assert names_in(tmp_path) == ["new"]


@pytest.mark.skipif(not AVAILABLE, reason="kills are placed by ptrace, on x86-64 Linux")
def test_where_there_are_no_hard_links_a_new_file_still_replaces_none(tmp_path, monkeypatch):
    def none(*names: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    durable.write_new(tmp_path / "key", b"first", mode=0o600)
    assert ((tmp_path / "key").read_bytes(), stat.S_IMODE((tmp_path / "key").stat().st_mode)) == (b"first", 0o600)
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "key", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_new_file_is_whole_or_not_there_whenever_its_writer_is_killed(tmp_path):
    count = run_killed(lambda: durable.write_new(tmp_path / "0", b"x" * 9000), None)
    for at in range(1, count + 1):
        path = tmp_path / str(at)
        run_killed(lambda path=path: durable.write_new(path, b"x" * 9000), at)
        assert not path.exists() or path.read_bytes() == b"x" * 9000
        assert path.exists() or not durable.write_new(path, b"again")


@pytest.mark.parametrize("shared", [False, True])
def test_the_mode_is_right_before_the_first_byte(tmp_path, shared):
    path = tmp_path / "file"
    path.touch(mode=0o644)
    left = tmp_path / ".file.partial"  # of a killed process
    left.touch(mode=0o644)
    with durable.replacing(path, mode=0o600, shared=shared) as descriptor:
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600
        assert os.fstat(descriptor).st_size == 0
        durable.write_all(descriptor, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"new"
    assert shared or not left.exists()


def test_file_and_folder_are_on_disk_in_that_order(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (calls.append(str(Path(f"/proc/self/fd/{number}").readlink())), sync(number))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("rename"), replace(old, new)))
    durable.write_atomically(tmp_path / "file", b"new")
    assert calls == [str(tmp_path / ".file.partial"), "rename", str(tmp_path)]
    calls.clear()
    make_keys(tmp_path / "keys")
    assert calls[-1] == str(tmp_path)
    assert len({call for call in calls if ".key." in call or ".pub." in call}) == 3


def test_processes_that_write_one_file_at_once_leave_one_of_their_versions_whole(tmp_path):
    path = tmp_path / "file"
    children = []
    for letter in b"ab":
        if not (child := os.fork()):
            status = 1
            try:
                for _ in range(30):
                    durable.write_atomically(path, bytes([letter]) * 100_000, shared=True)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert names_in(tmp_path) == ["file"]


def test_a_private_folder_s_missing_parents_are_its_owner_s_alone_and_others_stay(tmp_path):
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    made = durable.make_private(there / "a" / "b" / "c")
    assert durable.make_private(made) == made == there / "a" / "b" / "c"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (made, *made.parents[:2])} == {0o700}
    assert stat.S_IMODE(there.stat().st_mode) == 0o755
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            durable.make_private(path)


def test_a_digest_is_of_the_whole_file_and_a_secret_is_its_owner_s_alone(tmp_path):
    path = tmp_path / "file"
    durable.write_json(path, {"b": 1, "a": [2.5]}, mode=0o600)
    assert path.read_bytes() == b'{\n  "b": 1,\n  "a": [\n    2.5\n  ]\n}\n'
    assert durable.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not durable.open_to_others(path)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        assert durable.open_to_others(path)
    with pytest.raises(ValueError):
        durable.write_json(path, {"a": float("nan")})
