"""Which rows are held out, decided by patient and by nothing else.

A patient's side depends on (seed, name, patient) alone: not on the order of the rows, and not on who else is there
(but for the smallest sets, if both sides must have someone). A patient who joins later moves nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.imaging.manifest import Manifest


def held_out(patients: Sequence[str], *, share: float, seed: int, name: str, both: bool = True) -> NDArray[np.bool_]:
    """Which rows belong to held-out patients.

    Args:
        patients: one per row.
        share: expected share of patients held out, in [0, 1).
        seed: of the run.
        name: of the site or the purpose; two names hold out different patients.
        both: whether with share > 0 and two patients or more both sides have one at least. Under privacy they need not:
            who is put there would change with who else there is.

    Returns:
        (rows,) bool.
    """
    places = {patient: _place(seed, name, patient) for patient in set(patients)}
    held = {patient for patient, place in places.items() if place < share}
    if both and share > 0 and len(places) > 1:
        ranked = sorted(places, key=lambda patient: places[patient])
        held = (held | {ranked[0]}) - ({ranked[-1]} if len(held) == len(places) else set())
    return np.array([patient in held for patient in patients], dtype=bool)


def evaluation_rows(manifest: Manifest, share: float, seed: int, name: str, *, both: bool = True) -> NDArray[np.bool_]:
    """Which rows of a manifest are for evaluation: validation and test rows if it has splits, else `held_out`."""
    if any(row.split for row in manifest.rows):
        return np.array([row.split != "train" for row in manifest.rows], dtype=bool)
    return held_out(manifest.patients, share=share, seed=seed, name=name, both=both)


def _place(seed: int, name: str, patient: str) -> float:
    """A uniform number in [0, 1) from SHA-256 over (seed, name, patient)."""
    digest = hashlib.sha256(json.dumps([seed, name, patient]).encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2**53
