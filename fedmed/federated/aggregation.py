"""The weighted mean of updates, streamed: one update in memory at a time, whatever the number of sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedmed.errors import UpdateRefused
from fedmed.types import Entry, FloatVector, Layout, Weights

CHUNK = 65_536  # values; a chunk and its change stay in a core's second-level cache


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """What the sites agree on."""

    change: FloatVector  # weighted mean of (site's parameters - sent parameters), (layout.num_parameters,)
    buffers: FloatVector  # pooled buffers themselves, (layout.num_buffers,)


class WeightedMean:
    """Σ kᵢ·(wᵢ - w) / Σ kᵢ: FedAvg (McMahan et al. 2017, arXiv:1602.05629, algorithm 1), one update at a time.

    The sum runs over the sites' changes and not their networks: changes are small, and float32 keeps all their digits.
    BatchNorm variances pool as the mean of the variances plus the variance of the means, integer buffers
    (`num_batches_tracked`) as their maximum.
    """

    def __init__(self, layout: Layout, current: Weights) -> None:
        """Start from nothing; `current` is the network that the sites were sent."""
        self._layout, self._current = layout, current
        self._change = np.zeros(layout.num_parameters, np.float32)
        self._moments = np.zeros(layout.num_buffers, np.float64)
        self._largest = np.full(layout.num_buffers, -np.inf, np.float32)
        self._scratch = np.empty(CHUNK, np.float32)
        self.total = 0.0

    def add(self, weights: Weights, weight: float) -> None:
        """Add one site's network with its weight; `weights` is only read."""
        for part in _chunks(self._change.size):
            sent = self._current.parameters[part]
            change = np.subtract(weights.parameters[part], sent, out=self._scratch[: len(sent)])
            change *= np.float32(weight)
            self._change[part] += change
        self._moments += weight * second_moments(weights.buffers, self._layout).astype(np.float64)
        np.maximum(self._largest, weights.buffers, out=self._largest)
        self.total += weight

    def result(self) -> Aggregate:
        """The mean; the accumulator is spent afterwards.

        Raises:
            UpdateRefused: nothing was added.
        """
        if self.total <= 0:
            raise UpdateRefused("there is no update to average")
        self._change /= np.float32(self.total)
        buffers = variances((self._moments / self.total).astype(np.float32), self._layout)
        for entry in self._layout.buffers:
            if entry.integer:
                buffers[entry.span] = self._largest[entry.span]
        return Aggregate(change=self._change, buffers=buffers)


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


def _normalisations(layout: Layout) -> Iterator[tuple[Entry, Entry]]:
    """(running_mean, running_var) of every BatchNorm in the layout."""
    by_name = {entry.name: entry for entry in layout.buffers}
    for name, entry in by_name.items():
        prefix, found, _ = name.rpartition("running_mean")
        if found and f"{prefix}running_var" in by_name:
            yield entry, by_name[f"{prefix}running_var"]


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))
