"""Time images from the cache against images from DICOM, and both against copying the same bytes.

    .venv/bin/python benchmarks/data.py                 # about two minutes; run nothing beside it
    .venv/bin/python benchmarks/data.py --images 400 --seconds 1

A made-up set is read through the real door (`load_dataset`) into a real cache, and then read in random order, as in
training. The table is printed as markdown. Times are the best of several passes; rates are sums over processes that
run at the same time, one thread each. After it comes the table of `data_decode.py`: decoders by transfer syntax.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import data_decode
import numpy as np
import torch
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from fedmed.config import TaskConfig
from fedmed.imaging import decoding
from fedmed.imaging.dataset import Dataset, load_dataset
from fedmed.imaging.reading import read_image
from fedmed.imaging.resize import letterbox

BATCH = 16
PASSES = 7


def main() -> None:
    """Print the table, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="images of each made-up set")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a measurement of images per second")
    parser.add_argument("--reader", nargs=2, metavar=("FOLDER", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.reader:
        read_until(Path(options.reader[0]), int(options.reader[1]), options.seconds)
        return
    cores = len(os.sched_getaffinity(0))
    print(f"`python benchmarks/data.py`, {cores} cores, {platform.machine()}, {options.images} images a set\n")
    print("| what | ms an image | of copying its bytes |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for line in single_images(folder, options.images):
            print(line, flush=True)
        print("\n| batches of 16 as float32, 224 px | processes | images/s | GB/s of floats |\n|---|---|---|---|")
        for line in rates(folder, options.images, options.seconds):
            print(line, flush=True)
    print("\nDecoders, one 2048 × 2048 picture of 12 bits:\n\n```", flush=True)
    sys.argv[1:] = []
    data_decode.main()
    print("```")


def single_images(folder: Path, count: int) -> Iterator[str]:
    """A 512 × 512 image: from the cache in three forms, and from two DICOM files of 2048 × 2048."""
    order = np.random.default_rng(1).permutation(count)
    for bits in (8, 16):
        data = made(folder / f"512-{bits}", count, 512, bits)
        source, slots = data.images.sources[0], data.images.slot[order]
        copy, plain = np.empty_like(source[0]), np.array(source)
        floor, mapped = (
            best(lambda copy=copy, array=array, slots=slots: [np.copyto(copy, array[s]) for s in slots]) / count
            for array in (plain, source)
        )
        yield row(f"512², uint{bits}, copied from plain memory, in random order (the floor)", floor, floor)
        yield row(f"512², uint{bits}, from the memory map, in random order", mapped, floor)
        batches = [order[start : start + BATCH] for start in range(0, count - BATCH + 1, BATCH)]
        floats = best(lambda data=data, batches=batches: use(data, batches)) / len(batches) / BATCH
        yield row(f"512², uint{bits}, as float32 in batches of {BATCH}", floats, floor)
    cells = data_decode.radiograph(2048)
    for syntax, name in ((ExplicitVRLittleEndian, "raw"), (JPEG2000Lossless, "JPEG 2000")):
        path = folder / "image.dcm"
        data_decode.encoded(cells, syntax).save_as(path, enforce_file_format=True, overwrite=True)
        decode = best(lambda path=path: read_image(path))
        whole = best(lambda path=path: letterbox(read_image(path), 512))
        yield row(f"2048² from {name} DICOM, decoded and displayed", decode, floor)
        yield row("the same, resized to 512²", whole, floor)


def use(data: Dataset, batches: list[np.ndarray]) -> None:
    """Gather batches one after the other; none is kept, as in training."""
    for rows in batches:
        data.batch(rows)


def rates(folder: Path, count: int, seconds: float) -> Iterator[str]:
    """Images per second out of `Dataset.batch`, with one and two processes, beside a copy of as many floats."""
    block = np.ones((BATCH, 1, 224, 224), np.float32)
    copy = np.empty_like(block)
    per_image = best(lambda: [np.copyto(copy, block) for _ in range(200)]) / 200 / BATCH
    yield f"| copying float32 (the floor) | 1 | {1 / per_image:,.0f} | {block[0].nbytes / per_image / 1e9:.1f} |"
    for bits in (8, 16):
        made(folder / f"224-{bits}", count, 224, bits)
        for processes in (1, 2):
            rate = rate_of(processes, folder / f"224-{bits}", seconds)
            yield f"| uint{bits} from the cache | {processes} | {rate:,.0f} | {rate * block[0].nbytes / 1e9:.1f} |"


def rate_of(processes: int, folder: Path, seconds: float) -> float:
    """Images per second of several readers, all of which have loaded before any begins."""
    command = [sys.executable, __file__, "--seconds", str(seconds), "--reader", str(folder), "224"]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for reader in readers:
        reader.stdout.readline()
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
    return sum(float(reader.communicate()[0]) for reader in readers)


def read_until(folder: Path, size: int, seconds: float) -> None:
    """A reader: load, say so, wait for a line, then gather batches and print images per second."""
    data = loaded(folder, size)
    order = np.random.default_rng(os.getpid()).permutation(len(data))
    batches = [order[start : start + BATCH] for start in range(0, len(order) - BATCH + 1, BATCH)]
    print("ready", flush=True)
    sys.stdin.readline()
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for rows in batches:
            images += len(data.batch(rows)[0])
    print(images / (time.perf_counter() - started))


def made(folder: Path, count: int, size: int, bits: int) -> Dataset:
    """A set of noise, written as PNG and read into a cache beside it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    kind = np.uint8 if bits == 8 else np.uint16
    lines = ["patient_id,image,finding"]
    for number in range(count):
        pixels = rng.integers(0, 2**bits, (size, size), dtype=kind)
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=0)
        lines.append(f"{number},{number}.png,{number % 2}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    decoding.apart = decoding.here  # what is made here needs no other process to be safe from
    return loaded(folder, size)


def loaded(folder: Path, size: int) -> Dataset:
    """The set, out of its cache if it is there."""
    return load_dataset(
        folder / "manifest.csv", task=TaskConfig(labels=("finding",)), preset="cxr", image_size=size, in_channels=1,
        max_unreadable=0.0, site_share=0.0, seed=0, name="made", cache_dir=folder / "cache",
    )  # fmt: skip


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several passes, the first of which only warms up."""
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def row(what: str, seconds: float, floor: float) -> str:
    """A line of the table."""
    return f"| {what} | {1000 * seconds:.4f} | {seconds / floor:,.1f} × |"


if __name__ == "__main__":
    main()
