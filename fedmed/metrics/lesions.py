"""Lesion-wise detection: which lesions were found, and which were invented.

A lesion is a connected component of a mask, neighbours being those that share a face, an edge or a corner (8 in two
dimensions, 26 in three). A true lesion is found if at least one of its voxels is predicted, and a predicted one is
invented if none of its voxels is true: no share of overlap is asked for, which Dice judges already.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import label

from fedmed.metrics.surfaces import Mask, bounding_box


class LesionCounts(NamedTuple):
    """The lesions of one case."""

    true: int
    found: int  # of the true ones
    invented: int  # predicted where no true one is


def lesion_counts(predicted: Mask, true: Mask) -> LesionCounts:
    """Returns the counts of two masks (H, W) or (D, H, W)."""
    either = predicted | true
    if not either.any():
        return LesionCounts(0, 0, 0)
    box = bounding_box(either)
    predicted, true = predicted[box], true[box]
    everywhere = np.ones((3,) * true.ndim)
    true_lesion, lesions = label(true, everywhere)
    predicted_lesion, candidates = label(predicted, everywhere)
    both = predicted & true
    return LesionCounts(lesions, len(np.unique(true_lesion[both])), candidates - len(np.unique(predicted_lesion[both])))
