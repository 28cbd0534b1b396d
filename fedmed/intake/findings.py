"""What a data check says of what it saw: pass, warn or fail, and what to do. `fail` = training would be wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedmed.config import DataConfig, TaskConfig
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.manifest import read_manifest
from fedmed.intake.near_duplicates import Alike
from fedmed.intake.seen import Seen
from fedmed.intake.survey import EMPTY, OVERLAPPING

State = Literal["pass", "warn", "fail"]
MOST_UNREADABLE = DataConfig().max_unreadable  # share of images; the run that trains on them may set another
SHOWN = 20  # rows that a finding names


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    said: str
    do: str = ""
    rows: tuple[int, ...] = ()  # of the manifest file, some of them

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"what": self.what, "state": self.state, "said": self.said, "do": self.do, "rows": list(self.rows)}


def verdict(found: Sequence[Finding]) -> State:
    """The worst state."""
    states = {finding.state for finding in found}
    return "fail" if "fail" in states else "warn" if "warn" in states else "pass"


def findings(seen: Seen, alike: Alike, labels: tuple[str, ...]) -> tuple[Finding, ...]:
    """Everything that was looked at after the manifest itself (`as_read`), in the order of a page.

    Args:
        seen: what was seen.
        alike: pictures that look alike.
        labels: of the task.
    """
    pictures = (*_same_pictures(seen), _alike(seen, alike), *_masks(seen), *_identity(seen), *_kinds(seen))
    return (
        _unreadable(seen),
        *_patients(seen),
        *_labels(seen, labels),
        *(pictures if seen.sizes else _unseen(seen)),
    )


def _finding(
    what: str, state: State, said: str, do: str = "", seen: Seen | None = None, rows: Sequence[int] = ()
) -> Finding:
    numbers = () if seen is None else tuple(sorted({seen.rows[row] for row in rows}))[:SHOWN]
    return Finding(what=what, state=state, said=said, do=do, rows=numbers)


def as_read(manifest: Path, labels: tuple[str, ...], *, masked: bool) -> Finding:
    """What `read_manifest`, by which a training reads it, says of a manifest, in its own words.

    Args:
        manifest: the CSV.
        labels: of the task.
        masked: whether its rows have masks.
    """
    if not labels and not masked:
        do = "import with a table of labels, or name the columns with --task"
        return _finding(
            "manifest", "fail", "neither a mask nor a column of 0, 1 and nothing: there is nothing to learn", do
        )
    try:
        if labels:
            rows = len(read_manifest(manifest, TaskConfig(labels=labels)).rows)
        if masked:
            rows = len(read_manifest(manifest, TaskConfig(kind="segmentation", labels=("mask",))).rows)
    except (DataError, ConfigError) as error:
        return _finding("manifest", "fail", str(error).removeprefix(f"{manifest}: "), "mend the table, or import again")
    return _finding("manifest", "pass", f"{_many(rows, 'row')} can be read")


def _unreadable(seen: Seen) -> Finding:
    count = len(seen.unreadable)
    if not seen.images:
        return _finding("images", "fail", "no row names one", 'fill the column "image", or import again')
    if not count:
        return _finding("images", "pass", f"all {seen.images} can be read")
    reasons = "; ".join(f"{reason}: {many}" for reason, many in Counter(seen.unreadable.values()).most_common(6))
    few = count <= MOST_UNREADABLE * len(seen.rows)
    do = (
        "a training leaves them out"
        if few
        else f"a training refuses more than {100 * MOST_UNREADABLE:g} % (data.max-unreadable): mend or remove them"
    )
    return _finding(
        "images", "warn" if few else "fail", f"{count} cannot be read ({reasons})", do, seen, list(seen.unreadable)
    )


def _patients(seen: Seen) -> Iterator[Finding]:
    count = len(np.unique(seen.patients))
    if count < 2:
        yield _finding("patients", "fail", "one patient alone", "nobody could be held out; import more")
    else:
        yield _finding("patients", "pass", f"{_many(count, 'patient')}, {_many(len(seen.rows), 'row')}")
    pairs = np.unique(np.stack([seen.patients, seen.splits], axis=1), axis=0)
    torn = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    if len(torn):
        rows = np.flatnonzero(np.isin(seen.patients, torn)).tolist()
        do = "give all rows of a patient one split: the test would see training images"
        yield _finding("splits", "fail", f"{_many(len(torn), 'patient')} in more than one split", do, seen, rows)


def _unseen(seen: Seen) -> Iterator[Finding]:
    """No picture was seen, so none of them is without fault."""
    for what in ("leaks", "look-alikes", *(["masks"] if seen.masked else []), "identity"):
        yield _finding(
            what, "fail", "nothing was checked, as no image can be read", "mend the images, then check again"
        )


def _same_pictures(seen: Seen) -> Iterator[Finding]:
    """Equal pixels, by fingerprint: under two patients, or twice under one."""
    known = np.flatnonzero(seen.prints)
    order = known[np.argsort(seen.prints[known], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(seen.prints[order])) + 1)
    torn: list[int] = []
    twice: list[int] = []
    for group in groups:
        if len(group) > 1:
            rows = seen.of_row[group]
            (torn if len(set(seen.patients[rows].tolist())) > 1 else twice).extend(rows.tolist())
    if torn:
        people = len(set(seen.patients[torn].tolist()))
        do = "one person under several ids: give the rows one patient_id, or remove the copies"
        yield _finding(
            "leaks", "fail", f"the same picture under different patients ({_many(people, 'id')})", do, seen, torn
        )
    else:
        yield _finding("leaks", "pass", "no picture is there under two patients")
    if twice:
        yield _finding(
            "copies",
            "warn",
            f"{len(set(twice))} rows show a picture that their patient has twice",
            "keep one of each",
            seen,
            twice,
        )


def _alike(seen: Seen, alike: Alike) -> Finding:
    a, b = seen.of_row[alike.pairs[:, 0]], seen.of_row[alike.pairs[:, 1]]
    different = seen.prints[alike.pairs[:, 0]] != seen.prints[alike.pairs[:, 1]]
    rows = np.concatenate([a[different], b[different]]).tolist()
    count = alike.count - int((~different).sum())
    if not count:
        return _finding("look-alikes", "pass", "no two patients or splits have pictures that look alike")
    do = "look at these rows: copies of one picture are one patient; different pictures may stay"
    return _finding(
        "look-alikes", "warn", f"{count} pairs of pictures of different patients or splits look alike", do, seen, rows
    )


def _labels(seen: Seen, labels: tuple[str, ...]) -> Iterator[Finding]:
    known = {name: (int((values == 1).sum()), int((values == 0).sum())) for name, values in seen.labels.items()}
    if known and not any(sum(counts) for counts in known.values()):
        yield _finding("labels", "fail", "no label has a value", "look at labels.toml: which words mean 1 and 0?")
        return
    for name in labels:
        positive, negative = known.get(name, (0, 0))
        if not positive + negative and name in known:
            yield _finding(
                f"label {name}", "warn", "unknown in every row", "it is masked here; leave it if other sites have it"
            )
        elif name in known and not (positive and negative):
            one = "positive" if positive else "negative"
            do = "its AUROC is undefined here; look whether labels.toml has the other value"
            yield _finding(f"label {name}", "warn", f"{one} in every row that knows it", do)
    if known and all(positive and negative for positive, negative in known.values()):
        yield _finding("labels", "pass", f"{_many(len(known), 'label')}, each with both values")


def _masks(seen: Seen) -> Iterator[Finding]:
    if not seen.masked:
        return
    found = {mark.removeprefix("mask: "): rows for mark, rows in seen.marks.items() if mark.startswith("mask: ")}
    for what, rows in found.items():
        if what == OVERLAPPING:
            do = "name the regions of the run with --task: those must not overlap"
            yield _finding("masks", "warn", f"{_many(len(rows), 'mask')} whose {what}", do, seen, rows)
        elif what != EMPTY:
            do = "a training refuses it: write the mask anew, on its image's grid and with the task's numbers"
            yield _finding("masks", "fail", f"{_many(len(rows), 'mask')}: {what}", do, seen, rows)
    if empty := found.get(EMPTY):
        every = len(empty) == len(seen.rows)
        do = "look whether it was exported: nothing can be learnt" if every else "right where nothing is to be found"
        yield _finding("masks", "fail" if every else "warn", f"{_many(len(empty), 'mask')} empty", do, seen, empty)
    if not found:
        yield _finding("masks", "pass", "each fits its image, and none is empty")


def _identity(seen: Seen) -> Iterator[Finding]:
    clean = True
    if rows := seen.marks.get("identified"):
        clean = False
        do = "take them in with fedmed data import dicom, which de-identifies, and name what it wrote in the manifest"
        said = f"{_many(len(rows), 'image')} with the name of a patient, a doctor or a hospital in the header"
        yield _finding("identity", "fail", said, do, seen, rows)
    if rows := seen.marks.get("marked, and named"):
        clean = False
        said = "marked as de-identified, with a birth date, other id, doctor or hospital in the header"
        do = "look whether they are dummies, as many programs write; else take them in with fedmed data import dicom"
        yield _finding("identity", "warn", f"{_many(len(rows), 'image')} {said}", do, seen, rows)
    if rows := seen.marks.get("unmarked"):
        clean = False
        said, do = "not marked as de-identified", "fedmed data import dicom marks what it has cleaned"
        yield _finding("identity", "warn", f"{_many(len(rows), 'image')} {said}", do, seen, rows)
    for mark, rows in seen.marks.items():
        if mark.startswith("quarantine: "):
            clean = False
            reason, do = (
                mark.removeprefix("quarantine: "),
                "have a person look at them before anybody else sees a picture",
            )
            yield _finding("identity", "warn", f"{_many(len(rows), 'image')}: {reason}", do, seen, rows)
    if clean:
        looked = f", in the {len(seen.sizes)} images that can be read" if seen.unreadable else ""
        headers = "no birth date, other id, doctor or hospital in the headers, which are marked as de-identified; "
        said = f"{headers if seen.headers else ''}no text seen in the {_many(seen.searched, 'picture')} searched for it"
        yield _finding("identity", "pass", f"{said}{looked}")


def _kinds(seen: Seen) -> Iterator[Finding]:
    if rows := seen.marks.get("secondary capture"):
        do = 'data.preset = "cxr" leaves them out; "cxr-sc" and "color" let them in'
        yield _finding("kinds", "warn", f"{_many(len(rows), 'secondary capture')}", do, seen, rows)
    if rows := seen.marks.get("several frames"):
        do = 'data.items = "slices" takes their frames; "images" leaves them out'
        yield _finding("kinds", "warn", f"{_many(len(rows), 'file')} of several frames", do, seen, rows)
    if rows := seen.marks.get("faint"):
        do = "write them with values scaled to all 16 bits (12 bits: times 16): they are read as nearly black"
        said = f"{_many(len(rows), 'picture')} of 16 bits with values below an eighth of their range"
        yield _finding("kinds", "warn", said, do, seen, rows)
    formats = seen.counts.get("modality", Counter())
    if len(formats) > 1:
        named = ", ".join(f"{name} {count}" for name, count in formats.most_common())
        yield _finding(
            "kinds", "warn", f"several modalities ({named})", "a run reads all images of a site by one preset"
        )


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
