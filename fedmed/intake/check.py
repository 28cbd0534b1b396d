"""`fedmed data check`: everything about a manifest that a training would trip over, before it does.

Every image is looked at once (`survey`), in processes whose end is one image's error. What it comes to, `findings`
says, and `seen` holds.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.decoding import VOLUME_BYTES, VOLUME_TIMEOUT_S
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.manifest import ABOUT, read_columns
from fedmed.imaging.ordered import in_order
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.reading import presets_named
from fedmed.imaging.recipe import BETWEEN
from fedmed.intake import survey
from fedmed.intake.findings import as_read, findings, verdict
from fedmed.intake.near_duplicates import near_duplicates
from fedmed.intake.seen import Arrays, Seen, add_, facts_of
from fedmed.intake.survey import SIDE

PICTURES, PICTURE_SIDE = 24, 112  # thumbnails of a page, pixels
TEXT_SAMPLE = 400  # images in which burnt-in text is looked for: a tenth of a second each
AHEAD = 4  # images that each process has waiting
PAYS = 200  # images for which it pays to start a process

Look = Callable[..., Arrays]
Job = tuple[int, str, str, str]  # row, image, mask, preset; files as the manifest has them
Told = Callable[[str, int, int], None]  # what is done, how far, of how much


def check(
    manifest: Path,
    *,
    labels: Sequence[str] = (),
    preset: str = "",
    withdrawn: frozenset[str] = frozenset(),
    processes: int = 2,
    progress: Told | None = None,
) -> dict[str, Any]:
    """Look at everything that a manifest names.

    Args:
        manifest: the site's CSV.
        labels: of the task; () = every column that holds only 0, 1 and nothing. Where rows have masks and no label is
            a column, the regions of a segmentation.
        preset: that the run reads images with, or one for each modality; "" = any that shows them.
        withdrawn: whatever patients who withdrew may be called; it is as if the manifest did not name them.
        processes: that decode, at most.
        progress: told what is done and how far.

    Returns:
        Facts that JSON can hold: `state` ("pass", "warn" or "fail"), `findings`, counts, histograms and pictures. They
        are for the site: exact, and with thumbnails. `card.card_of` takes from them what may leave.

    Raises:
        DataError: the manifest cannot be read at all.
        ConfigError: the preset is unknown.
    """
    if preset:
        presets_named(preset)
    seen, jobs = _table(manifest, tuple(labels), preset, withdrawn)
    regions = () if seen.labels or not seen.masked else tuple(labels)
    task = () if regions else tuple(labels) or tuple(seen.labels)
    read = as_read(manifest, task, masked=seen.masked)  # before there are thumbnails: it takes as much memory
    _look_(seen, jobs, manifest.parent, regions, processes, progress)
    alike = near_duplicates(
        seen.thumbnails,
        seen.patients[seen.of_row],
        seen.splits[seen.of_row],
        progress=None if progress is None else lambda done, of: progress("comparing", done, of),
    )
    found = (read, *findings(seen, alike, task))
    told = {"state": verdict(found), "findings": [finding.facts() for finding in found]}
    return told | facts_of(seen, manifest) | {"withdrawn": who_withdrew(manifest, withdrawn)}


def who_withdrew(manifest: Path, withdrawn: frozenset[str]) -> str:
    """A digest of the patients of a manifest who withdrew, so that a check before and one after are told apart.

    Raises:
        DataError: the manifest cannot be read.
    """
    here = sorted({*read_columns(manifest)[1]["patient_id"]} & withdrawn) if withdrawn else []
    return hashlib.sha256("\n".join(here).encode()).hexdigest()


def _table(manifest: Path, labels: tuple[str, ...], preset: str, withdrawn: frozenset[str]) -> tuple[Seen, list[Job]]:
    """What a manifest says of the rows of those who have not withdrawn, and their images."""
    lines, columns = read_columns(manifest)
    if withdrawn:
        kept = [row for row, patient in enumerate(columns["patient_id"]) if patient not in withdrawn]
        if not kept:
            raise DataError("every patient of the manifest has opted out")
        lines = tuple(lines[row] for row in kept)
        columns = {name: [values[row] for row in kept] for name, values in columns.items()}
    count = len(lines)
    chosen = labels or tuple(name for name in columns if name not in ABOUT and _is_label(columns[name]))
    masks = columns.get("mask", ("",) * count)
    seen = Seen(
        rows=list(lines),
        patients=_numbers(columns["patient_id"]),
        splits=_numbers(columns.get("split", ("",) * count)),
        labels={name: _values(columns[name]) for name in chosen if name in columns},
        masked=any(masks),
    )
    for name in ("view", "sex"):
        seen.counts[name] = Counter(value or "not said" for value in columns.get(name, ()))
    seen.ages = [float(age) for age in columns.get("age", ()) if age.replace(".", "", 1).isdigit()]
    return seen, list(_jobs(columns["image"], masks, preset))


def _jobs(images: Sequence[str], masks: Sequence[str], preset: str) -> Iterator[Job]:
    """Every image: its row, its file, the mask of a row at its first image, and how it is read."""
    presets = preset.split(BETWEEN)
    for row, (cell, mask) in enumerate(zip(images, masks, strict=True)):
        for place, image in enumerate(map(str.strip, cell.split(BETWEEN))):
            if image:
                yield row, image, mask, presets[place % len(presets)]
                mask = ""


def _look_(
    seen: Seen, jobs: Sequence[Job], folder: Path, regions: tuple[str, ...], processes: int, progress: Told | None
) -> None:
    """Look at every image, whose files are in a folder, and add what is seen."""
    shown, read = (_spread(len(jobs), most) for most in (PICTURES, TEXT_SAMPLE))
    seen.images = len(jobs)
    seen.thumbnails = np.zeros((len(jobs), SIDE, SIDE), np.uint8)
    seen.of_row = np.array([row for row, *_ in jobs], np.int64)
    seen.prints = np.zeros(len(jobs), np.uint64)
    processes = min(processes, -(-len(jobs) // PAYS))

    def one(look: Look, number: int) -> Arrays | UnreadableImage:
        _, image, mask, preset = jobs[number]
        files = {"image": str(folder / image), "mask": str(folder / mask) if mask else ""}
        side = PICTURE_SIDE if number in shown else 0
        text = number in read
        try:
            return look(**files, side=side, text=text, regions=regions, preset=preset)
        except UnreadableImage as error:
            return error

    with closing(in_order(range(len(jobs)), one, apart, processes=processes, ahead=AHEAD)) as outcomes:
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, UnreadableImage):
                seen.unreadable[jobs[number][0]] = str(outcome)
            else:
                add_(seen, number, jobs[number][0], outcome)
            if progress is not None:
                progress("looking", number + 1, len(jobs))


@contextmanager
def apart() -> Iterator[Look]:
    """Look at images in another process: a decoder that crashes, hangs or eats memory costs one image."""
    with DecodingProcess(timeout_s=VOLUME_TIMEOUT_S, memory_bytes=VOLUME_BYTES, jobs="fedmed.intake.survey") as process:
        yield lambda **settings: process.run("look", **settings)


@contextmanager
def here() -> Iterator[Look]:
    """Look at images in this process: to be put in the place of `apart` for a debugger."""

    def look(**settings: Any) -> Arrays:
        with plain_errors():
            return survey.look(**settings)

    yield look


def _spread(count: int, most: int) -> set[int]:
    """At most so many of `count` numbers, evenly spread."""
    return set(np.linspace(0, count - 1, min(most, count)).astype(int).tolist())


def _is_label(column: Sequence[str]) -> bool:
    values = set(column)
    return bool(values - {""}) and values <= {"", "0", "1", "0.0", "1.0"}


def _values(column: Sequence[str]) -> NDArray[np.int8]:
    meaning = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
    return np.array([meaning.get(value, -1) for value in column], np.int8)


def _numbers(texts: Sequence[str]) -> NDArray[np.int64]:
    """Texts as numbers, equal ones equal."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(text, len(known)) for text in texts], np.int64)
