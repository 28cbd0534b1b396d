"""The cache among processes: built by two, killed, full, bounded, and looked at."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import Count, assert_equal, counting, everything, folder_of, load, segments, site

from fedmed.errors import DataError
from fedmed.imaging.cache import kept, upkeep
from fedmed.imaging.cache.index import Index

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def decodings() -> Iterator[Count]:
    with counting() as count:
        yield count


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return site(tmp_path / "site")


CHILD = """
import contextlib, resource, sys
from pathlib import Path
from fedmed.config import TaskConfig
from fedmed.errors import DataError
from fedmed.imaging import decoding
from fedmed.imaging.cache import kept
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.recipe import Recipe

path, cache, size, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
real = decoding.here
@contextlib.contextmanager
def told(recipe):
    with real(recipe) as decode:
        def one(row):
            if not limit:
                print("row", flush=True)
                sys.stdin.readline()
            return decode(row)
        yield one
decoding.apart = told
kept.COMMIT_S = 0.0  # after every row
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
rows = read_manifest(path, TaskConfig(labels=("a", "b"))).rows
try:
    held = kept.kept(rows, Recipe(preset="cxr", image_size=size), cache, limit_gib=1)
    print("done", flush=True)
    sys.stdin.readline()
except DataError as error:
    print(error)
"""


def child(path: Path, cache: Path, *, image_size: int = 16, limit: int = 0) -> subprocess.Popen[str]:
    """A process that decodes a row whenever it is sent a line; with a limit, at once, but no file may grow larger."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(cache), str(image_size), str(limit)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("limit", [1000, 100_000])  # the index does not fit; the images do not fit
def test_a_full_disk_is_one_line_and_leaves_a_cache_that_works(path: Path, cache: Path, limit: int) -> None:
    process = child(path, cache, image_size=128, limit=limit)
    line, complaint = process.communicate(timeout=100)
    assert process.returncode == 0 and complaint == ""
    assert line.startswith("the image cache cannot be used (") and line.count("\n") == 1
    assert str(cache) not in line
    assert_equal(load(path, cache_dir=cache, image_size=128), load(path, image_size=128))


@contextlib.contextmanager
def builder(path: Path, cache: Path, *, image_size: int = 16) -> Iterator[subprocess.Popen[str]]:
    with child(path, cache, image_size=image_size) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def proceed(process: subprocess.Popen[str], rows: int) -> str:
    """Let it decode so many rows; what it says then."""
    answer = said(process)
    for _ in range(rows):
        tell(process)
        answer = said(process)
    return answer


def test_a_killed_build_is_taken_up_where_it_was_killed(path: Path, cache: Path, decodings: Count) -> None:
    plain, left = load(path), 8
    for rows in (0, 3, 2):  # killed while it decodes its first, its fourth and its third row
        with builder(path, cache) as process:
            assert proceed(process, rows) == "row"
            process.send_signal(signal.SIGKILL)
        left -= rows
    decodings.rows = 0
    assert_equal(load(path, cache_dir=cache), plain)
    assert decodings.rows == left == 3


@pytest.mark.slow
def test_a_build_killed_at_any_moment_leaves_a_cache_that_works(path: Path, cache: Path) -> None:
    plain = load(path)
    rng = np.random.default_rng(0)
    for _ in range(25):
        shutil.rmtree(cache, ignore_errors=True)
        with builder(path, cache) as process:
            proceed(process, int(rng.integers(0, 6)))
            for _ in range(2):
                tell(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(float(rng.random()) * 0.05)
            process.send_signal(signal.SIGKILL)
        assert_equal(load(path, cache_dir=cache), plain)


def test_what_a_killed_process_left_is_removed_in_time(path: Path, cache: Path) -> None:
    load(path, cache_dir=cache)
    orphan = folder_of(cache) / f"{'0' * 16}.images.u1"
    for age, there in ((0, True), (2 * upkeep.ORPHAN_S, False)):
        orphan.write_bytes(b"pixels")
        os.utime(orphan, (time.time() - age,) * 2)
        with closing(Index(folder_of(cache))) as index:
            upkeep.keep_within(folder_of(cache), index, 1e12)
        assert orphan.exists() == there


@pytest.mark.parametrize("sizes", [(16, 16), (16, 24)], ids=["the same set", "two sets"])
def test_two_processes_may_build_at_once(path: Path, cache: Path, sizes: tuple[int, int]) -> None:
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(builder(path, cache, image_size=size)) for size in sizes]
        for process in both:
            assert said(process) == "row"
        for row in range(8):
            for process in both:  # both at once: neither is waited for before the other is told
                tell(process)
            for process in both:
                assert said(process) == ("row" if row < 7 else "done")
    for size in sizes:
        assert_equal(load(path, cache_dir=cache, image_size=size), load(path, image_size=size))


def aged(cache: Path) -> None:
    """As if everything had been used an hour ago."""
    with closing(sqlite3.connect(folder_of(cache) / "index.sqlite")) as rows, rows:
        rows.execute("UPDATE segments SET used = used - 3600")


def test_the_sets_used_longest_ago_go_when_there_is_too_much(path: Path, cache: Path, decodings: Count) -> None:
    one_set = 8 * 64 * 64
    for size in (64, 65, 66):
        load(path, cache_dir=cache, image_size=size, cache_gib=2.5 * one_set / 2**30)
        aged(cache)
        if size == 65:
            load(path, cache_dir=cache, image_size=64)  # used again: now the other one is the older
    decodings.rows = 0
    load(path, cache_dir=cache, image_size=64)
    load(path, cache_dir=cache, image_size=66)
    assert decodings.rows == 0
    load(path, cache_dir=cache, image_size=65)
    assert decodings.rows == 8


def test_what_is_in_use_never_goes_and_a_limit_that_is_too_small_is_one_line(path: Path, cache: Path) -> None:
    held = load(path, cache_dir=cache, image_size=64)
    before = everything(held)[0].clone()
    with pytest.raises(DataError, match=r"need more than data\.cache-gib = 1e-05"):
        load(path, cache_dir=cache, image_size=65, cache_gib=1e-5)
    with closing(Index(folder_of(cache))) as index:
        assert upkeep.keep_within(folder_of(cache), index, 0) == 8 * 64 * 64
        assert torch.equal(everything(held)[0], before)
        part = held.select(np.arange(8) < 2)
        del held
        assert upkeep.keep_within(folder_of(cache), index, 0) == 8 * 64 * 64  # a selection is a use
        del part
        assert upkeep.keep_within(folder_of(cache), index, 0) == 0
    assert segments(cache) == []


def test_a_set_in_use_by_another_process_never_goes(path: Path, cache: Path) -> None:
    with builder(path, cache) as process:
        assert proceed(process, 8) == "done"
        with closing(Index(folder_of(cache))) as index:
            assert upkeep.keep_within(folder_of(cache), index, 0) > 0
            process.kill()
            process.wait()
            assert upkeep.keep_within(folder_of(cache), index, 0) == 0


def fedmed(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedmed", "data", "cache", *arguments],
        capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ, "FEDMED_CACHE": str(cache)},
    )  # fmt: skip


def test_the_command_shows_what_is_kept_and_shrinks_it(path: Path, cache: Path) -> None:
    assert fedmed(cache=cache).stdout == "no decoded images are kept\n"
    load(path, cache_dir=cache, image_size=64)
    load(path, cache_dir=cache, image_size=32)
    facts = json.loads(fedmed("--json", cache=cache).stdout)
    assert facts["bytes"] == 8 * (64 * 64 + 32 * 32)
    assert [(kept["image_size"], kept["rows"], kept["bytes"]) for kept in facts["sets"]] == [
        (64, 8, 8 * 64 * 64), (32, 8, 8 * 32 * 32)
    ]  # fmt: skip
    lines = fedmed(cache=cache).stdout.splitlines()
    assert lines[1].startswith("cxr images 64") and lines[2].startswith("cxr images 32")
    after = json.loads(fedmed("--keep", str(9000 / 2**30), "--json", cache=cache).stdout)
    assert [kept["image_size"] for kept in after["sets"]] == [32]  # the other was used longer ago
    assert json.loads(fedmed("--clear", "--json", str(cache), cache=cache / "elsewhere").stdout)["sets"] == []


def test_the_command_finds_damage_that_a_sample_misses(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(path, cache_dir=cache)
    (segment,) = segments(cache)
    data = segment.read_bytes()
    assert "nothing is damaged" in fedmed("--verify", cache=cache).stderr
    segment.write_bytes(data[:-9] + b"\x55" + data[-8:])
    monkeypatch.setattr(kept, "CHECKED_BYTES", 0)
    load(path, cache_dir=cache)
    assert json.loads(fedmed("--verify", "--json", cache=cache).stdout)["damaged_removed"] == 1
    assert_equal(load(path, cache_dir=cache), load(path))
