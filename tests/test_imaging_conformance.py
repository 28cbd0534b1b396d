"""Real DICOM files against a manifest of what they hold, and pydicom's own test files against pydicom."""

from __future__ import annotations

import csv
import hashlib
import warnings
from collections import Counter
from pathlib import Path

import pydicom
import pytest

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.decoding import NEEDS_GPL, stored_frames
from fedmed.imaging.dicom.opening import is_dicom, open_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.reading import PRESETS, read_frames

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "dicom"
BUNDLED = sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*.dcm"))


def sha1_of(path: Path, *, gpl: bool = True) -> tuple[str, str]:
    """Of the stored pixels of all frames, or "" and the reason."""
    digest = hashlib.sha1(usedforsecurity=False)
    try:
        with plain_errors():
            if not is_dicom(path):
                return "", "not DICOM"
            for frame in stored_frames(open_dicom(path), gpl=gpl):
                digest.update(frame.tobytes())
    except UnreadableImage as error:
        return "", str(error)
    return digest.hexdigest(), ""


def shown_or_refused(path: Path, preset: str) -> str:
    """The word "shown", or the one clean reason; every shown frame is finite and in [0, 1]."""
    try:
        for pixels in read_frames(path, preset):
            assert pixels.ndim == 3
            assert pixels.shape[0] == PRESETS[preset].channels
            assert pixels.min() >= 0
            assert pixels.max() <= 1
    except UnreadableImage as error:
        reason = str(error)
    else:
        return "shown"
    assert "\n" not in reason
    assert len(reason) < 80
    assert str(path.parent) not in reason
    return reason


@pytest.mark.skipif(not DATA.is_dir(), reason="the conformance files are not here")
def test_every_real_file_behaves_as_its_manifest_says(capsys: pytest.CaptureFixture[str]) -> None:
    with (DATA / "dev" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts: Counter[str] = Counter()
    for row in rows:
        digest, reason = sha1_of(DATA / row["path"])
        if reason == NEEDS_GPL and row["expected"] == "decodes":  # the extra is not installed
            counts["not read without the gpl-decoders extra"] += 1
            continue
        assert bool(digest) == (row["expected"] == "decodes"), f"{row['expected']}, but: {reason or 'read'}"
        if not digest:
            counts[f"refused, as expected ({row['expected']})"] += 1
            continue
        assert digest == row["px_sha1"], f"other pixels in transfer syntax {row['ts']}"
        if row["ts"].startswith("JPEG Extended") and not sha1_of(DATA / row["path"], gpl=False)[0]:
            assert sha1_of(DATA / row["path"], gpl=False)[1] == NEEDS_GPL
            counts["the same pixels, but only with the gpl-decoders extra"] += 1
            continue
        counts["the same pixels"] += 1
    assert sum(counts.values()) == len(rows)
    assert counts["the same pixels"] > 400
    with capsys.disabled():
        print(f"\n{len(rows)} real files:", "; ".join(f"{count} {what}" for what, count in counts.most_common()))


@pytest.mark.skipif(not DATA.is_dir(), reason="the conformance files are not here")
@pytest.mark.parametrize("preset", ["cxr", "mr", "color"])
def test_every_real_file_is_a_picture_or_has_a_reason(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(path for folder in ("files", "broken") for path in (DATA / "dev" / folder).rglob("*.dcm"))
    counts = Counter(shown_or_refused(path, preset) for path in paths)
    assert counts["shown"] > 10
    assert counts["cannot be decoded (TypeError)"] == 0  # our own mistake, most likely
    assert counts["cannot be decoded (AttributeError)"] == 0
    with capsys.disabled():
        print(f"\n{preset}:", "; ".join(f"{count} {what}" for what, count in counts.most_common()))


@pytest.mark.skipif(not DATA.is_dir(), reason="the conformance files are not here")
def test_broken_files_are_refused_for_what_is_wrong_with_them() -> None:
    reasons = {
        "ct_huge_dims": "larger than 512 MiB",
        "ct_trunc_pixels": "truncated pixels",
        "ct_no_rows": "header lacks Rows",
        "ct_no_photometric": "header lacks PhotometricInterpretation",
        "ct_no_pixels": "no pixels",
        "ct_slope0": "rescale slope is zero or not a number",
        "ct_ww0": "shown",
        "ct_text": "neither DICOM, PNG nor JPEG",
        "ct_multi_window": "shown",
        "ct_mono1": "shown",
    }
    for name, reason in reasons.items():
        assert shown_or_refused(DATA / "dev" / "broken" / f"{name}.dcm", "cxr") == reason


def test_pydicoms_own_files_have_pydicoms_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    for path in BUNDLED:
        digest, reason = sha1_of(path)
        expected = pydicoms_sha1(path)
        assert digest == expected, f"{path.name}: {reason or 'read, but not by pydicom, or otherwise'}"
        counts["the same pixels" if digest else "refused by both"] += 1
        for preset in ("cxr", "color"):
            shown_or_refused(path, preset)
    assert counts["the same pixels"] > 40
    with capsys.disabled():
        print(f"\n{len(BUNDLED)} files of pydicom:", "; ".join(f"{count} {what}" for what, count in counts.items()))


def pydicoms_sha1(path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return hashlib.sha1(pydicom.dcmread(path).pixel_array.tobytes(), usedforsecurity=False).hexdigest()
        except Exception:  # whatever it cannot read
            return ""
