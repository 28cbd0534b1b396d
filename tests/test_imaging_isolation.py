"""The decoding process: crashes, hangs and greed in a real child cost one file each."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from dicom_files import SECRET, cells_of, image_object, picture, written

from fedmed.errors import ConfigError, DataError, UnreadableImage
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.items import item
from fedmed.imaging.recipe import Recipe

ROOT = Path(__file__).parent.parent

JOBS = f"""
import os, sys, time
import numpy as np
from fedmed.errors import DataError

def crash(): os.abort()
def hang(): time.sleep(600)
def shout():
    os.write(1, b"noise"); os.write(2, b"noise"); print("{SECRET}"); print("{SECRET}", file=sys.stderr)
    return {{"said": np.arange(3)}}
def greedy(mebibytes): return {{"last": np.ones(mebibytes << 17)[-1:]}}
def mistake(): raise ValueError("{SECRET}")
def misfit(): raise DataError("the mask does not fit", public="a mask does not fit")
def echo(text): return {{"text": np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)}}
def many():
    return {{"a": np.zeros((2, 0)), "b": np.arange(6, dtype="u2").reshape(2, 3).T, "c": np.float64(7).reshape(()),
            "d": np.array([True, False])}}
def large(): return {{"x": np.arange(3_000_000, dtype=np.float32)}}

JOBS = {{f.__name__: f for f in (crash, hang, shout, greedy, mistake, misfit, echo, many, large)}}
"""


def asked(path: Path, preset: str = "cxr") -> dict[str, Any]:
    return {"image": str(path), "mask": "", "recipe": Recipe(preset=preset, image_size=64).settings()}


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of jobs that go wrong."""
    (tmp_path / "wrong_jobs.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "wrong_jobs"


def test_a_crash_is_one_files_error_and_the_next_is_read(jobs: str) -> None:
    with DecodingProcess(jobs=jobs) as process:
        process.run("many")
        first = process.pid
        with pytest.raises(UnreadableImage, match=r"^its decoder crashed$"):
            process.run("crash")
        assert process.run("echo", text="on")["text"].tobytes() == b"on"
        assert process.pid != first
    assert process.pid is None


def test_a_hang_is_ended(jobs: str) -> None:
    with DecodingProcess(jobs=jobs, timeout_s=2) as process:
        process.run("many")
        child = psutil.Process(process.pid)
        start = time.monotonic()
        with pytest.raises(UnreadableImage, match=r"^its decoder did not end within 2 s$"):
            process.run("hang")
        assert time.monotonic() - start < 5
        assert not child.is_running()


def test_greed_is_refused_and_leaves_the_child_alive(jobs: str) -> None:
    with DecodingProcess(jobs=jobs, memory_bytes=256 * 2**20) as process:
        assert process.run("greedy", mebibytes=64)["last"] == 1
        first = process.pid
        with pytest.raises(UnreadableImage, match=r"^needs more memory than it may have$"):
            process.run("greedy", mebibytes=1024)
        assert process.run("greedy", mebibytes=64)["last"] == 1
        assert process.pid == first


def test_what_a_decoder_prints_goes_nowhere(jobs: str, capfd: pytest.CaptureFixture[str]) -> None:
    with DecodingProcess(jobs=jobs) as process:
        np.testing.assert_array_equal(process.run("shout")["said"], [0, 1, 2])
        np.testing.assert_array_equal(process.run("shout")["said"], [0, 1, 2])
    assert capfd.readouterr() == ("", "")


def test_errors_keep_their_class_and_lose_foreign_text(jobs: str) -> None:
    with DecodingProcess(jobs=jobs) as process:
        with pytest.raises(UnreadableImage, match=r"cannot be decoded \(ValueError\)") as caught:
            process.run("mistake")
        assert SECRET not in str(caught.value)
        with pytest.raises(DataError, match="the mask does not fit") as misfit:
            process.run("misfit")
        assert misfit.value.public == "a mask does not fit"
        assert not isinstance(misfit.value, UnreadableImage)


def test_arrays_of_every_shape_come_back_whole(jobs: str) -> None:
    with DecodingProcess(jobs=jobs) as process:
        arrays = process.run("many")
        assert arrays["a"].shape == (2, 0)
        np.testing.assert_array_equal(arrays["b"], np.arange(6).reshape(2, 3).T)
        assert arrays["b"].dtype == np.uint16
        assert (arrays["c"].shape, float(arrays["c"])) == ((), 7.0)
        np.testing.assert_array_equal(arrays["d"], [True, False])
        np.testing.assert_array_equal(process.run("large")["x"], np.arange(3_000_000))
        arrays["b"][0, 0] = 9  # ours to change


def test_names_that_are_no_text_survive_the_pipe(jobs: str) -> None:
    with DecodingProcess(jobs=jobs) as process:
        name = os.fsdecode(b"caf\xe9\n.dcm")
        assert os.fsencode(process.run("echo", text=name)["text"].tobytes()) == os.fsencode(name)
        long = "x" * 1_000_000  # more than a pipe holds
        assert process.run("echo", text=long)["text"].size == len(long)


def test_a_child_that_dies_while_idle_is_replaced_without_an_error(jobs: str) -> None:
    with DecodingProcess(jobs=jobs) as process:
        process.run("many")
        child = psutil.Process(process.pid)
        child.kill()
        child.wait(10)
        assert process.run("echo", text="on")["text"].tobytes() == b"on"


def test_a_child_that_cannot_start_says_so() -> None:
    with DecodingProcess(jobs="no_such_jobs") as process, pytest.raises(DataError, match="does not start"):
        process.run("many")


def test_images_are_the_same_through_the_child(tmp_path: Path) -> None:
    path = written(image_object(cells_of(picture())), tmp_path / f"{SECRET}.dcm")
    with DecodingProcess() as process:
        here, there = item(**asked(path)), process.run("item", **asked(path))
        assert here.keys() == there.keys()
        np.testing.assert_array_equal(there["images"], here["images"])
        with pytest.raises(UnreadableImage, match="no such file"):
            process.run("item", **asked(tmp_path / "none"))
        with pytest.raises(ConfigError, match="unknown"):
            process.run("item", **asked(path, preset="none"))


def test_the_child_is_up_at_once_and_never_loads_torch(jobs: str, tmp_path: Path) -> None:
    path = written(image_object(cells_of(picture())), tmp_path / "x")
    with DecodingProcess() as process:
        process.run("item", **asked(path))
        child = psutil.Process(process.pid)
        assert not [mapping.path for mapping in child.memory_maps() if "torch" in mapping.path]
        assert child.memory_info().rss < 160 * 2**20
        assert child.num_threads() == 1


def test_the_child_ends_with_its_parent(jobs: str) -> None:
    code = (
        "import os, sys; from fedmed.imaging.isolation import DecodingProcess\n"
        f"p = DecodingProcess(jobs={jobs!r}); p.run('many'); print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    child = int(parent.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"


def _in_a_fork(process: DecodingProcess, first: int, pipe: object) -> None:
    pipe.send(process.run("echo", text="fork")["text"].tobytes() == b"fork" and process.pid != first)
    process.close()


def test_a_forked_owner_has_a_child_of_its_own(jobs: str) -> None:
    fork = multiprocessing.get_context("fork")
    with DecodingProcess(jobs=jobs) as process:
        process.run("many")
        here, there = fork.Pipe()
        worker = fork.Process(target=_in_a_fork, args=(process, process.pid, there))
        worker.start()
        assert here.recv()
        worker.join(10)
        assert process.run("echo", text="on")["text"].tobytes() == b"on"
