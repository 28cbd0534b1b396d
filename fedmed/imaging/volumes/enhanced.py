"""An enhanced or legacy converted multi-frame object as a volume (DICOM PS3.3 C.7.6.16)."""

from __future__ import annotations

from pathlib import Path

from fedmed.errors import UnreadableImage
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.headers import CLASSIC, ENHANCED, enhanced_slices, kind_of
from fedmed.imaging.volumes.pixels import decoded
from fedmed.imaging.volumes.slices import grouped, only_volume
from fedmed.imaging.volumes.volume import Volume


def read_enhanced(path: Path) -> Volume:
    """The one volume in a multi-frame object, its frames placed by their own positions.

    Args:
        path: enhanced CT, MR, PET, X-ray 3D or tomosynthesis.

    Raises:
        UnreadableImage: a single slice, cine frames, another kind of object, or frames that make no regular grid.
    """
    with plain_errors():
        ds = open_dicom(path)
        kind, frames = kind_of(ds), int(ds.get("NumberOfFrames") or 1)
        if kind in CLASSIC and frames == 1:
            raise UnreadableImage("a single slice; name the folder of its series")
        if kind not in ENHANCED:
            raise UnreadableImage(
                "frames of a cine or of another kind, not slices of a volume" if frames > 1 else "not a volume"
            )
        slices = list(enhanced_slices(ds, path))
        if not slices:
            raise UnreadableImage("only localizers")
        return decoded(only_volume(grouped(slices)))
