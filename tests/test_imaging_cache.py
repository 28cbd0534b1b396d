"""The cache of decoded images: found by content, shared, bounded, safe under two processes, kill -9 and damage."""

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
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_imaging_dataset import LABELS, LUNG, everything, load, site, volumes

from fedmed.errors import DataError
from fedmed.imaging import decoding
from fedmed.imaging.cache import digests, joining, kept, upkeep
from fedmed.imaging.cache.index import Index
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.stored import Slots

ROOT = Path(__file__).parent.parent


class Count:
    """How many rows were decoded."""

    rows = 0


@pytest.fixture(autouse=True)
def decodings(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Decode in this process, and count it."""
    count = Count()

    @contextlib.contextmanager
    def counted(recipe):
        with decoding.here(recipe) as decode:

            def one(row):
                count.rows += 1
                return decode(row)

            yield one

    monkeypatch.setattr(decoding, "apart", counted)
    return count


def folder_of(cache: Path) -> Path:
    return cache / upkeep.FOLDER


def segments(cache: Path) -> list[Path]:
    return sorted(path for path in folder_of(cache).iterdir() if upkeep.SEGMENT_FILE.fullmatch(path.name))


def assert_equal(one: Dataset, two: Dataset) -> None:
    assert (one.unreadable, one.patients, dict(one.reasons)) == (two.unreadable, two.patients, dict(two.reasons))
    for a, b in zip(everything(one), everything(two), strict=True):
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return site(tmp_path / "site")


def test_a_cache_gives_what_memory_gives_and_decodes_once(path: Path, cache: Path, decodings: Count) -> None:
    (path.parent / "3.png").write_bytes(b"")
    plain = load(path, max_unreadable=0.5)
    decodings.rows = 0
    for _ in range(3):
        assert_equal(load(path, max_unreadable=0.5, cache_dir=cache), plain)
    assert decodings.rows == 8  # the unreadable one is remembered too


def test_masks_and_volumes_of_any_size_are_kept_too(tmp_path: Path, cache: Path, decodings: Count) -> None:
    path = volumes(tmp_path / "site", [(3, 6, 5), (5, 6, 5), (2, 9, 8)])
    for task, items in ((LABELS, "slices"), (LUNG, "slices"), (LUNG, "volumes"), (LUNG, "patches")):
        options: dict[str, Any] = {"preset": "mr", "items": items, "volume_size": (4, 4, 4)}
        plain = load(path, task, **options)
        first, decodings.rows = load(path, task, cache_dir=cache, **options), 0
        second = load(path, task, cache_dir=cache, **options)
        assert decodings.rows == 0
        assert_equal(first, plain)
        assert_equal(second, plain)


def test_the_size_of_patches_and_labels_of_images_share_what_is_kept(
    tmp_path: Path, cache: Path, decodings: Count
) -> None:
    path = volumes(tmp_path / "site", [(3, 6, 5), (5, 6, 5)])
    for size, seed in (((2, 2, 2), 1), ((4, 4, 4), 2)):
        load(path, preset="mr", items="patches", volume_size=size, seed=seed, site_share=0.5, cache_dir=cache)
    assert decodings.rows == 2


def test_pixels_are_for_their_owner_alone_and_no_name_is_on_the_disk(path: Path, cache: Path) -> None:
    load(path, cache_dir=cache)
    assert folder_of(cache).stat().st_mode & 0o077 == 0
    assert all(segment.stat().st_mode & 0o077 == 0 for segment in segments(cache))
    everything_kept = b"".join(file.read_bytes() for file in folder_of(cache).iterdir())
    for name in (b"P0", b"P3", b".png", b"manifest", os.fsencode(path.parent.name + "/"), os.fsencode(path.parent)):
        assert name not in everything_kept


@pytest.mark.parametrize("change", ["move", "copy", "touch"])
def test_a_moved_copied_or_touched_set_is_found(path: Path, cache: Path, decodings: Count, change: str) -> None:
    plain, decodings.rows = load(path, cache_dir=cache), 0
    if change == "touch":
        os.utime(path.parent / "0.png", ns=(1, 1))
    else:
        (shutil.move if change == "move" else shutil.copytree)(path.parent, path.parent.parent / "other")
        path = path.parent.parent / "other" / path.name
    assert_equal(load(path, cache_dir=cache), plain)
    assert decodings.rows == 0


def test_an_edited_file_of_the_same_size_and_time_is_read_again(path: Path, cache: Path, decodings: Count) -> None:
    """Its time of change tells, which no tool can put back."""
    first, facts = load(path, cache_dir=cache), (path.parent / "0.png").stat()
    data = bytearray((path.parent / "0.png").read_bytes())
    other = (path.parent / "1.png").read_bytes()
    size = max(len(data), len(other))
    (path.parent / "0.png").write_bytes(other.ljust(size, b"\0"))
    (path.parent / "1.png").write_bytes(bytes(data).ljust(size, b"\0"))
    os.utime(path.parent / "0.png", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    second = load(path, cache_dir=cache)
    assert torch.equal(everything(second)[0][[1, 0]], everything(first)[0][[0, 1]])


def test_a_file_is_hashed_once_when_it_has_settled(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def counted(file, method, real=digests.hashlib.file_digest):
        hashed.append(file)
        return real(file, method)

    monkeypatch.setattr(digests.hashlib, "file_digest", counted)
    monkeypatch.setattr(digests, "SETTLED_NS", 10**12)  # every file here has changed in the last thousand seconds
    for _ in range(2):
        load(path, cache_dir=cache)
    assert len(hashed) == 16
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    hashed.clear()
    for _ in range(3):
        load(path, cache_dir=cache)
    assert len(hashed) == 8
    os.utime(path.parent / "2.png")
    load(path, cache_dir=cache)
    assert len(hashed) == 9


def test_one_new_row_decodes_one_row_and_another_setting_all(path: Path, cache: Path, decodings: Count) -> None:
    load(path, cache_dir=cache)
    Image.new("L", (9, 9), 77).save(path.parent / "new.png")
    path.write_text(path.read_text() + "\nP9,new.png,1,0")
    decodings.rows = 0
    dataset = load(path, cache_dir=cache)
    assert decodings.rows == 1 and len(dataset) == 9
    assert_equal(dataset, load(path))
    decodings.rows = 0
    load(path, cache_dir=cache, image_size=8)
    assert decodings.rows == 9


@pytest.mark.parametrize("masked", [False, True])
def test_many_small_additions_become_one_segment(tmp_path: Path, cache: Path, decodings: Count, masked: bool) -> None:
    """As at a hospital that adds an image a day."""
    path = site(tmp_path / "site", 24)
    text = "patient_id,image,mask,a,b\n" if masked else "patient_id,image,a,b\n"
    rows = [f"P{i},{i}.png,{f'{i}m.png,' if masked else ''}1,0\n" for i in range(24)]
    for i in range(24):
        mask = np.random.default_rng(i).integers(0, 2, (20, 16), dtype=np.uint8)
        Image.fromarray(mask).save(path.parent / f"{i}m.png")
    task = LUNG if masked else LABELS
    most = 0
    for day in range(1, 25):
        path.write_text(text + "".join(rows[:day]))
        held = load(path, task, cache_dir=cache)  # the one of yesterday is in use while this one is made
        most = max(most, len(segments(cache)))
    lanes = 2 if masked else 1
    assert decodings.rows == 24
    assert most <= lanes * 2 * (joining.MOST_SEGMENTS + 1)
    del held
    with closing(Index(folder_of(cache))) as index:
        upkeep.keep_within(folder_of(cache), index, 1e12)
        assert len(index.segments()) <= joining.MOST_SEGMENTS
        assert sum(index.rows_in().values()) == 24
        assert set(index.rows_in()) == {segment.name for segment in index.segments()}
    decodings.rows = 0
    kept_set = load(path, task, cache_dir=cache)
    assert decodings.rows == 0
    assert_equal(kept_set, load(path, task))


def test_equal_files_are_kept_once(tmp_path: Path, cache: Path, decodings: Count) -> None:
    path = site(tmp_path / "site")
    shutil.copy(path.parent / "0.png", path.parent / "1.png")
    dataset = load(path, cache_dir=cache)
    assert decodings.rows == 7
    assert torch.equal(everything(dataset)[0][0], everything(dataset)[0][1])


def test_a_failure_that_may_pass_is_tried_again(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def crashing(recipe):
        def one(row):
            raise decoding.UnreadableImage("its decoder crashed")

        yield one

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "apart", crashing)
        with pytest.raises(DataError, match="its decoder crashed"):
            load(path, cache_dir=cache)
    assert load(path, cache_dir=cache).unreadable == ()


def test_other_decoders_try_again_what_was_unreadable(
    path: Path, cache: Path, decodings: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / "3.png").write_bytes(b"")
    load(path, max_unreadable=0.5, cache_dir=cache)
    monkeypatch.setattr(kept, "_decoders", lambda: "others")
    decodings.rows = 0
    load(path, max_unreadable=0.5, cache_dir=cache)
    assert decodings.rows == 1


@pytest.mark.parametrize("damage", ["emptied", "shortened", "flipped", "gone", "another's"])
def test_a_damaged_segment_is_found_and_built_again(path: Path, cache: Path, decodings: Count, damage: str) -> None:
    plain = load(path, cache_dir=cache)
    expected = [part.clone() for part in everything(plain)]
    del plain
    (segment,) = segments(cache)
    data = segment.read_bytes()
    if damage == "gone":
        segment.unlink()
    else:
        segment.write_bytes(
            {"emptied": b"", "shortened": data[:-1], "flipped": data[:500] + b"\x55" + data[501:],
             "another's": data[::-1]}[damage]
        )  # fmt: skip
    decodings.rows = 0
    dataset = load(path, cache_dir=cache)
    assert decodings.rows == 8
    for one, two in zip(everything(dataset), expected, strict=True):
        assert torch.equal(one.nan_to_num(9), two.nan_to_num(9))
    assert segments(cache) != [segment] and len(segments(cache)) == 1


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 500, None])
def test_a_damaged_index_begins_anew(path: Path, cache: Path, damage: bytes | None) -> None:
    plain = load(path)
    load(path, cache_dir=cache)
    index = folder_of(cache) / "index.sqlite"
    data = index.read_bytes()
    index.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096) if damage is None else damage)
    assert_equal(load(path, cache_dir=cache), plain)
    assert_equal(load(path, cache_dir=cache), plain)


def test_a_cache_that_cannot_be_written_is_one_line(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the image cache cannot be used \(file exists\)") as caught:
        load(path, cache_dir=tmp_path / "file")
    assert str(tmp_path) not in str(caught.value)


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


def test_pixels_are_mapped_and_not_copied(path: Path, cache: Path) -> None:
    images = load(path, cache_dir=cache).images
    assert isinstance(images, Slots)
    (source,) = images.sources
    assert not source.flags.owndata and not source.flags.writeable


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
