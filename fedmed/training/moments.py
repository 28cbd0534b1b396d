"""How buffers of several sites become one: running variances do not average, second moments do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedmed.types import Entry, FloatVector, Layout


def second_moments(buffers: FloatVector, layout: Layout) -> FloatVector:
    """Replace every running variance by variance + mean², which averages where a variance does not."""
    moments = buffers.copy() if layout.buffers else buffers
    for mean, variance in _normalisations(layout):
        moments[variance.span] += buffers[mean.span] ** 2
    return moments


def variances(moments: FloatVector, layout: Layout) -> FloatVector:
    """The inverse of `second_moments`."""
    buffers = moments.copy()
    for mean, variance in _normalisations(layout):
        buffers[variance.span] = np.maximum(moments[variance.span] - moments[mean.span] ** 2, 0)
    return buffers


def has_negative_variance(buffers: FloatVector, layout: Layout) -> bool:
    """Whether any running variance is below 0, which no data have."""
    found = [buffers[variance.span] for _, variance in _normalisations(layout)]
    return bool(found) and bool(np.concatenate(found).min() < 0)


def _normalisations(layout: Layout) -> Iterator[tuple[Entry, Entry]]:
    """(running_mean, running_var) of every BatchNorm in the layout."""
    by_name = {entry.name: entry for entry in layout.buffers}
    for name, entry in by_name.items():
        prefix, found, _ = name.rpartition("running_mean")
        if found and f"{prefix}running_var" in by_name:
            yield entry, by_name[f"{prefix}running_var"]
