"""Which series a DICOM segmentation (SEG) or an RT structure set outlines, by the UIDs that it refers to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.intake.kinds.found import Unmatched

KINDS = ("SEG", "RTSTRUCT")  # by Modality
REFERRED = ("ReferencedSeriesSequence", "RTReferencedSeriesSequence")  # whose items have a Series Instance UID
UNREADABLE, NOWHERE = "mask that cannot be read", "mask of a projection, which lies nowhere in space"
NO_IMAGE, SEVERAL = "mask without image", "one of several masks of a series, or of several series"


@dataclass(frozen=True, kw_only=True)
class Regions:
    """The masks of an archive by the folder of the series that they outline."""

    of_series: dict[Path, Path] = field(default_factory=dict)
    unmatched: tuple[Unmatched, ...] = ()


def regions_of(masks: Iterable[tuple[str, Path]], objects: Iterable[tuple[str, Path]], source: Path) -> Regions:
    """Pair masks with series, each one with one.

    Args:
        masks: patients and files of segmentations and structure sets.
        objects: patients and files of images, as `keep` names them: `…/SERIES/OBJECT.dcm`.
        source: to which the places of what stays unmatched are relative.
    """
    wanted: dict[Path, tuple[str, set[str]]] = {}  # mask to whose it is, and the UIDs that it refers to
    left: dict[Path, str] = {}  # mask to why it has no image
    asking: dict[str, set[Path]] = defaultdict(set)  # such a UID to masks
    for patient, mask in masks:
        try:
            uids = _referred(mask)
        except UnreadableImage:
            left[mask] = UNREADABLE
            continue
        wanted[mask] = (patient, uids)
        for uid in uids:
            asking[uid].add(mask)
    met: set[tuple[Path, Path]] = set()  # mask and series
    for patient, image in objects:
        for mask in asking.get(image.parent.name, set()) | asking.get(image.stem, set()):
            if wanted[mask][0] == patient:
                met.add((mask, image.parent))
    series_of, masks_of = Counter(mask for mask, _ in met), Counter(series for _, series in met)
    of_series = {series: mask for mask, series in met if series_of[mask] == masks_of[series] == 1}
    for mask in wanted.keys() - set(of_series.values()):
        left[mask] = SEVERAL if series_of[mask] else NO_IMAGE if wanted[mask][1] else NOWHERE
    told = (Unmatched(what=why, place=str(mask.relative_to(source))) for mask, why in sorted(left.items()))
    return Regions(of_series=of_series, unmatched=tuple(told))


def _referred(path: Path) -> set[str]:
    """UIDs of the series and objects that a mask refers to; none if it does not lie in space (PS3.3 C.7.4.1).

    Raises:
        UnreadableImage: it cannot be parsed.
    """
    with plain_errors():
        ds = open_dicom(path)
        placed = ds.get("FrameOfReferenceUID") or str(ds.get("Modality")) == "RTSTRUCT"
        return set(_uids(ds)) if placed else set()


def _uids(ds: Dataset) -> Iterator[str]:
    """Of the references of a segmentation (C.8.20, C.7.6.16.2.6) or structure set (C.8.8.5, C.8.8.6), at any depth."""
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                if element.keyword in REFERRED and item.get("SeriesInstanceUID"):
                    yield str(item.SeriesInstanceUID)
                yield from _uids(item)
        elif element.keyword == "ReferencedSOPInstanceUID":
            yield str(element.value)
