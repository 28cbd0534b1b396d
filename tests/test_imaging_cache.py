"""The cache of decoded images: found by content, kept private, and whole again after damage."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import LABELS, LUNG, Count, assert_equal, counting, everything, folder_of, load, segments, site, volumes
from PIL import Image

from fedmed.errors import DataError
from fedmed.imaging import decoding
from fedmed.imaging.cache import digests, joining, kept, upkeep
from fedmed.imaging.cache.index import Index
from fedmed.imaging.stored import Slots


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


def test_pixels_are_mapped_and_not_copied(path: Path, cache: Path) -> None:
    images = load(path, cache_dir=cache).images
    assert isinstance(images, Slots)
    (source,) = images.sources
    assert not source.flags.owndata and not source.flags.writeable
