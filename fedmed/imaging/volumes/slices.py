"""Slices as their headers describe them, and which of them make a volume together (DICOM PS3.3 C.7.6.2).

A series is not a volume. It may hold two echoes, ten time points, magnitude and phase, an axial and a sagittal stack,
or slices of another matrix. Slices are grouped by series, frame of reference and orientation; where positions repeat,
a group is split by the one attribute (or two) that tells the repetitions apart, or refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UnreadableImage
from fedmed.imaging.volumes.geometry import SAME_POSITION_MM, Plane, in_words, stacked
from fedmed.imaging.volumes.volume import MAX_VOXELS, Affine

Places = NDArray[np.int64]  # (N,)

SAME_DIRECTION = 1e-4  # of direction cosines
SAME_SPACING = 1e-4  # relative
TELL_APART = {  # attributes that may differ where positions repeat, the likeliest first, and their plain names
    "EchoTime": "echo time",
    "EchoNumbers": "echo number",
    "TemporalPositionIdentifier": "time point",
    "AcquisitionNumber": "acquisition",
    "DiffusionBValue": "b-value",
    "DiffusionGradientOrientation": "diffusion direction",
    "ImageType": "image type",
    "TriggerTime": "trigger time",
    "NominalPercentageOfCardiacPhase": "cardiac phase",
    "FrameReferenceTime": "time frame",
    "InversionTime": "inversion time",
    "FlipAngle": "flip angle",
    "ConvolutionKernel": "reconstruction kernel",
    "KVP": "tube voltage",
    "StackID": "stack",
    "SequenceName": "sequence",
    "AcquisitionTime": "acquisition time",
    "ContentTime": "time of creation",
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice before its pixels are read."""

    file: Path
    frame: int  # of that file, from 0
    instance: str  # SOP Instance UID (0008,0018)
    kind: tuple[str, ...]  # SOP class, modality, series: slices of different kinds are never stacked
    frame_of_reference: str
    shape: tuple[int, int]  # rows, columns
    plane: Plane
    facts: Mapping[str, Hashable]  # some of TELL_APART

    @property
    def modality(self) -> str:
        """DICOM's (0008,0060)."""
        return self.kind[1]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Slices that make a volume, in order."""

    slices: tuple[Slice, ...]
    affine: Affine
    siblings: int = 1  # how many groups its series was split into where positions repeat
    differs: str = ""  # in what they differ


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Slices that make no volume."""

    reason: str
    slices: int
    blocks: bool = False  # whether another group of the same folder may not be taken for the whole either


def grouped(slices: Iterable[Slice]) -> list[Group | Refusal]:
    """Every volume that the slices make, and every group of them that makes none; the largest groups first.

    Of copies of one object, such as "IM1.dcm" and "IM1 (1).dcm", one counts.
    """
    found: list[Group | Refusal] = []
    once = [copies[0] for copies in _partition(slices, _identity)]
    for same in _partition(once, lambda one: (one.kind, one.frame_of_reference)):
        for parallel in _parallel(same):
            found += _volumes(parallel)
    return sorted(found, key=lambda one: -(one.slices if isinstance(one, Refusal) else len(one.slices)))


def only_volume(groups: Sequence[Group | Refusal]) -> Group:
    """The one volume.

    Raises:
        UnreadableImage: there is none, or there are several; the reason says why, or how they differ.
    """
    usable = [group for group in groups if isinstance(group, Group)]
    refused = [group for group in groups if isinstance(group, Refusal)]
    most = max((len(group.slices) for group in usable), default=0)
    for refusal in sorted(refused, key=lambda one: not one.blocks):
        if refusal.blocks or refusal.slices >= most:  # a reformat beside a broken stack is not the whole
            raise UnreadableImage(refusal.reason)
    if not usable:
        raise UnreadableImage("no slices")
    count = max(len(usable), usable[0].siblings)
    if count > 1:
        raise UnreadableImage(f"{in_words(count)} volumes, not one: they differ in {_difference(usable)}")
    return usable[0]


def _difference(groups: Sequence[Group]) -> str:
    if groups[0].differs:
        return groups[0].differs
    first = groups[0].slices[0]
    if any(group.slices[0].kind != first.kind for group in groups):
        return "their series"
    if any(group.slices[0].frame_of_reference != first.frame_of_reference for group in groups):
        return "their frame of reference"
    return "orientation"


def _volumes(slices: list[Slice]) -> Iterator[Group | Refusal]:
    """Of slices of one orientation."""
    planes = [one.plane for one in slices]
    spacings = np.array([plane.spacing_mm for plane in planes])
    if len({one.shape for one in slices}) > 1:
        yield Refusal(reason="slices of different sizes", slices=len(slices))
    elif np.abs(spacings / spacings[0] - 1).max() > SAME_SPACING:
        yield Refusal(reason="slices of different pixel spacing", slices=len(slices))
    else:
        where = _positions(planes)
        parts, differs = [slices], ""
        if where.max() == 0 and len(slices) > 1:
            yield Refusal(reason="all slices lie at one position: a cine, not a volume", slices=len(slices))
            return
        if max(Counter(where.tolist()).values()) > 1:
            parts, differs = _split(slices, where)
        for part in parts:
            yield _volume(part, siblings=len(parts), differs=differs)


def _volume(slices: list[Slice], *, siblings: int, differs: str) -> Group | Refusal:
    try:
        stack = stacked([one.plane for one in slices])
    except UnreadableImage as error:
        text = str(error)
        if "positions" in text:
            text += ", and nothing in their headers tells the repetitions apart"
        return Refusal(reason=text, slices=len(slices))
    rows, columns = slices[0].shape
    if len(slices) * rows * columns > MAX_VOXELS:
        return Refusal(reason=f"more than {MAX_VOXELS >> 20} million voxels", slices=len(slices))
    ordered = tuple(slices[index] for index in stack.order)
    return Group(slices=ordered, affine=stack.affine, siblings=siblings, differs=differs)


def _split(slices: list[Slice], where: Places) -> tuple[list[list[Slice]], str]:
    """Parts without repetitions, as many as a position is repeated, and what they differ in; else one part.

    Exactly so many: a time of acquisition that differs from slice to slice would tell everything apart.
    """
    most = max(Counter(where.tolist()).values())
    places = dict(zip(map(id, slices), where.tolist(), strict=True))
    varying = [name for name in TELL_APART if len({one.facts.get(name) for one in slices}) > 1]
    for names in (*combinations(varying, 1), *combinations(varying, 2)):
        parts = _partition(slices, partial(_facts, names))
        if len(parts) == most and all(len({places[id(one)] for one in part}) == len(part) for part in parts):
            return parts, " and ".join(TELL_APART[name] for name in names)
    return [slices], ""


def _identity(one: Slice) -> Hashable:
    """Equal for copies. The UID alone does not say so: some anonymizers give all slices the same."""
    return one.instance or one.file, one.frame, one.shape, one.plane, *one.facts.values()


def _facts(names: Sequence[str], one: Slice) -> tuple[Hashable, ...]:
    return tuple(one.facts.get(name) for name in names)


def _positions(planes: Sequence[Plane]) -> Places:
    """(N,) which place along the normal each plane has, counted from 0."""
    distances = np.array([plane.position for plane in planes]) @ planes[0].normal
    order = np.argsort(distances, kind="stable")
    places = np.empty(len(planes), np.int64)
    places[order] = np.concatenate([[0], np.cumsum(np.diff(distances[order]) >= SAME_POSITION_MM)])
    return places


def _parallel(slices: list[Slice]) -> Iterator[list[Slice]]:
    """Slices of one orientation each."""
    groups: list[tuple[NDArray[np.float64], list[Slice]]] = []
    for one in slices:
        directions = np.array([*one.plane.along_row, *one.plane.along_column])
        for seen, members in groups:
            if np.abs(directions - seen).max() <= SAME_DIRECTION:
                members.append(one)
                break
        else:
            groups.append((directions, [one]))
    return (members for _, members in groups)


def _partition(slices: Iterable[Slice], key: Callable[[Slice], Hashable]) -> list[list[Slice]]:
    """Slices of equal key together, keys in the order of their first slice."""
    parts: dict[Hashable, list[Slice]] = defaultdict(list)
    for one in slices:
        parts[key(one)].append(one)
    return list(parts.values())
