"""Jobs of the process that looks at pixels (`fedmed.imaging.isolation`), whose crash takes nothing else down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def pixels(path: str) -> dict[str, Any]:
    """Of one object: `reason`, the letters of why a person must look at it first, none if nothing speaks against it."""
    from fedmed.imaging.dicom.opening import open_dicom  # heavy
    from fedmed.intake.quarantine import pixel_reason  # heavy

    return {"reason": np.frombuffer((pixel_reason(open_dicom(Path(path))) or "").encode(), np.uint8)}


def cells(path: str) -> dict[str, Any]:
    """Of one object: `cells`, bytes that are to take the place of its pixels, none if they may stay."""
    from fedmed.intake.pixels import blanked_cells  # heavy

    return {"cells": np.frombuffer(blanked_cells(Path(path)), np.uint8)}


def pictures(path: str, side: int) -> dict[str, Any]:
    """Of one object: what is judged of it in (h, w) greys of at most `side` pixels, by number."""
    from PIL import Image  # heavy

    from fedmed.imaging.dicom.opening import open_dicom  # heavy
    from fedmed.intake.burned_in import judged_frames, stretched  # heavy

    found = [Image.fromarray(grey) for frame in judged_frames(open_dicom(Path(path))) for grey in stretched(frame)]
    for each in found:
        each.thumbnail((side, side))
    return {str(number): np.asarray(each) for number, each in enumerate(found)}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"pixels": pixels, "cells": cells, "pictures": pictures}
