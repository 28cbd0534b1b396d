"""Damaged files by the hundred (by the thousand with `-m slow`): one clean error each, in time, in little memory.

Hypothesis makes the damage, so a failure shrinks to the fewest edits. The examples are the same every time unless
FEDMED_FUZZ is set.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, cells_of, content_of, image_object, item_of, picture
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    UltrasoundImageStorage,
)

from fedmed.errors import UnreadableImage
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.reading import PRESETS, read_frames, read_mask

FIXED = not os.environ.get("FEDMED_FUZZ")
TIME_S = 5.0
ROOM_BYTES = 72 * 2**20  # of libraries that are loaded by need, and of buffers that do not grow with the picture
JPEG_FAMILY = b"1.2.840.10008.1.2.4."  # native decoders, which may crash: these are damaged in a child only
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"

JOBS = '''
import time
from pathlib import Path
import numpy as np
from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.dicom.pixels import declared
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.reading import read_frames

def kibibytes(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])

def measured(path, preset):
    """Seconds, bytes above where it began, and bytes that the header declares."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start, reason, frames = kibibytes("VmRSS"), time.perf_counter(), "", 0
    try:
        for frame in read_frames(Path(path), preset):
            frames += 1
            assert frame.min() >= 0 and frame.max() <= 1
    except UnreadableImage as error:
        reason = str(error)
    seconds, peak = time.perf_counter() - start, kibibytes("VmHWM") - before
    claimed = 0
    try:
        with plain_errors():
            if is_dicom(Path(path)):
                claims = declared(open_dicom(Path(path)))
                claimed = claims.frame_bytes * claims.frames
            else:
                from PIL import Image
                with Image.open(path) as image:
                    claimed = image.width * image.height * 4
    except UnreadableImage:
        pass
    return {"figures": np.array([seconds, peak * 1024, claimed, frames]),
            "reason": np.frombuffer(reason.encode(), np.uint8)}

JOBS = {"measured": measured}
'''


@cache
def seeds() -> list[tuple[bytes, tuple[str, ...]]]:
    """Whole files, and what no message about them may hold."""
    cells = cells_of(picture((40, 36)))
    colours = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    group = item_of(PixelValueTransformationSequence=[item_of(RescaleSlope=2, RescaleIntercept=-5)])
    objects = [
        image_object(cells, syntax=syntax, WindowCenter=2048, WindowWidth=4096, RescaleSlope=1, RescaleIntercept=-1024)
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless,
                       JPEG2000Lossless, JPEGLSLossless)
    ]  # fmt: skip
    for syntax in (ExplicitVRLittleEndian, RLELossless, JPEGLSLossless):
        objects.append(image_object(colours, bits=8, syntax=syntax, SOPClassUID=UltrasoundImageStorage))
        objects.append(image_object(np.stack([cells] * 3), syntax=syntax, SOPClassUID=EnhancedCTImageStorage,
                                    SharedFunctionalGroupsSequence=[group]))  # fmt: skip
    files = [(content_of(ds), (SECRET, "1.2.3.4711")) for ds in objects]
    for kind in ("PNG", "JPEG"):
        for pixels in (colours, colours[..., 0]):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, kind)
            files.append((buffer.getvalue(), (SECRET,)))
    for path in sorted(BUNDLED.glob("*.dcm")):
        if path.stat().st_size < 150_000:
            files.append((path.read_bytes(), _identifiers(path)))
    return files


def _identifiers(path: Path) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        keywords = ("PatientID", "PatientName", "SOPInstanceUID", "StudyInstanceUID", "AccessionNumber")
        texts = (str(ds.get(keyword) or "") for keyword in keywords)
    return tuple(text for text in texts if len(text) > 3)


def damaged(whole: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """A file after some edits; most fall into its first two kilobytes, where the header is."""
    content = bytearray(whole)
    for kind, place, value in edits:
        if not content:
            break
        place = place % len(content) if place % 4 == 0 else place // 4 % min(len(content), 2048)
        match kind:
            case "flip":
                content[place] ^= 1 << value % 8
            case "byte":
                content[place] = value % 256
            case "short":  # rows, columns, bits, lengths
                content[place : place + 2] = (0, 1, 0x7FFF, 0xFFFF, 0xFFFE, 4096)[value % 6].to_bytes(2, "little")
            case "long":
                content[place : place + 4] = (0, 2**31, 2**32 - 1, 2**28, 3)[value % 5].to_bytes(4, "little")
            case "cut":
                del content[place + 1 :]
            case "remove":
                del content[place : place + value % 64]
            case "repeat":
                content[place:place] = content[place : place + value % 64]
    return bytes(content)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "byte", "byte", "short", "long", "cut", "remove", "repeat"]),
        st.integers(0, 2**20),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=5,
)
EXAMPLES = given(number=st.integers(0, 2**16), preset=st.sampled_from(sorted(PRESETS)), edits=EDITS)
QUIETLY = {
    "deadline": None,
    "derandomize": FIXED,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
}


@settings(max_examples=400, **QUIETLY)
@EXAMPLES
def test_damage_ends_in_a_picture_or_one_clean_error(
    tmp_path: Path, number: int, preset: str, edits: list[tuple[str, int, int]]
) -> None:
    plain = [seed for seed in seeds() if JPEG_FAMILY not in seed[0][:600]]
    whole, secrets = plain[number % len(plain)]
    path = tmp_path / f"{SECRET}.dcm"
    path.write_bytes(damaged(whole, edits))
    start = time.perf_counter()
    try:
        for pixels in read_frames(path, preset):
            assert pixels.dtype == np.float32
            assert pixels.min() >= 0
            assert pixels.max() <= 1
    except UnreadableImage as error:
        check_reason(error, secrets)
    assert time.perf_counter() - start < TIME_S


@settings(max_examples=60, **QUIETLY)
@given(place=st.integers(1, 10**6), kind=st.sampled_from(["PNG", "JPEG"]))
def test_masks_cut_anywhere_are_whole_or_refused(tmp_path: Path, place: int, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(cells_of(picture(), 8).astype(np.uint8)).save(buffer, kind)
    path = tmp_path / f"{SECRET}.png"
    path.write_bytes(buffer.getvalue()[: -(place % len(buffer.getvalue()))])
    try:
        assert read_mask(path).shape == picture().shape  # Pillow needs no last chunk
    except UnreadableImage as error:
        check_reason(error, (SECRET,))


def check_reason(error: UnreadableImage, secrets: tuple[str, ...]) -> None:
    """One short line, with nothing hung on it that a log would print."""
    text = str(error)
    assert 0 < len(text) < 100
    assert "\n" not in text
    assert not any(secret in text for secret in (*secrets, SECRET))
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


@pytest.fixture(scope="module")
def measuring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecodingProcess]:
    """A child that has decoded one file already."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "measuring_jobs.py").write_text(JOBS)
    (folder / "warm").write_bytes(seeds()[0][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with DecodingProcess(jobs="measuring_jobs", timeout_s=30) as process:
            process.run("measured", path=str(folder / "warm"), preset="cxr")
            yield process


def check_measured(process: DecodingProcess, path: Path, preset: str, content: bytes, secrets: tuple[str, ...]) -> None:
    """In the child: under the limits of time and memory. A crash of the child is one clean error as well."""
    path.write_bytes(content)
    try:
        answer = process.run("measured", path=str(path), preset=preset)
    except UnreadableImage as error:
        check_reason(error, secrets)
        if "crashed" in str(error):
            return
        raise
    seconds, peak_bytes, declared_bytes, _ = answer["figures"].tolist()
    assert seconds < TIME_S
    assert peak_bytes <= ROOM_BYTES + 4 * declared_bytes
    check_reason(UnreadableImage(answer["reason"].tobytes().decode() or "none"), secrets)


@settings(max_examples=150, **QUIETLY)
@EXAMPLES
def test_damage_takes_little_time_and_memory(
    measuring: DecodingProcess, tmp_path: Path, number: int, preset: str, edits: list[tuple[str, int, int]]
) -> None:
    whole, secrets = seeds()[number % len(seeds())]
    check_measured(measuring, tmp_path / "x", preset, damaged(whole, edits), secrets)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=8000, **QUIETLY)
@EXAMPLES
def test_thousands_of_damaged_files_take_little_time_and_memory(
    measuring: DecodingProcess, tmp_path: Path, number: int, preset: str, edits: list[tuple[str, int, int]]
) -> None:
    whole, secrets = seeds()[number % len(seeds())]
    check_measured(measuring, tmp_path / "x", preset, damaged(whole, edits), secrets)


@pytest.mark.parametrize("preset", ["cxr", "mr", "ct-soft", "color"])
def test_large_pictures_stay_within_four_times_their_size(
    measuring: DecodingProcess, tmp_path: Path, preset: str
) -> None:
    cells = np.zeros((4096, 4000), np.uint16)  # 32 MB
    cells[100:-100, 100:-100] = np.arange(3800) % 4096
    for syntax in (ExplicitVRLittleEndian, JPEGLSLossless):
        tags = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "RescaleSlope": 1, "RescaleIntercept": -1000}
        content = content_of(image_object(cells, syntax=syntax, PixelPaddingValue=0, **tags))
        check_measured(measuring, tmp_path / "x", preset, content, (SECRET,))
