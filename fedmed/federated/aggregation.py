"""The weighted mean of updates, streamed: one update in memory at a time, whatever the number of sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.linalg.blas import saxpy

from fedmed.errors import UpdateRefused
from fedmed.training.moments import second_moments, variances
from fedmed.types import FloatVector, Layout, Scalar, Weights

CHUNK = 8192  # values: fewer than OpenBLAS adds with threads of its own, which would take the cores of those who train


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One site's part in a round, without its vectors."""

    site: str
    weight: float  # k: what the update counts for in the mean; only ratios matter
    facts: Mapping[str, Scalar] = field(default_factory=lambda: MappingProxyType({}))  # what the site said
    scale: float = 1.0  # by which the change was multiplied: norm clipping, and what the algorithm asks for
    clipped: bool = False


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """What the sites agree on."""

    change: FloatVector  # combined (site's parameters - sent parameters), (layout.num_parameters,)
    buffers: FloatVector  # pooled buffers themselves, (layout.num_buffers,)
    scaled_sum: FloatVector | None = None  # Σ fᵢ·Δᵢ with `ServerStep.scaled_sum_factor`, where it is asked for
    contributions: tuple[Contribution, ...] = ()  # of whom, with the weights that counted in the end
    known: int = 0  # sites of the federation, whether they took part in this round or not
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # for the log: who was discarded


class WeightedMean:
    """Σ kᵢ·(wᵢ - w) / Σ kᵢ: FedAvg (McMahan et al. 2017, arXiv:1602.05629, algorithm 1), one update at a time.

    The sum runs over the sites' changes and not their networks: changes are small, and float32 keeps all their digits.
    BatchNorm variances pool as the mean of the variances plus the variance of the means, integer buffers
    (`num_batches_tracked`) as their maximum.
    """

    def __init__(self, layout: Layout, current: Weights, *, scaled_sum: bool = False) -> None:
        """Start from nothing.

        Args:
            layout: of the network.
            current: that the sites were sent.
            scaled_sum: whether the changes are added up once more, each times another factor.
        """
        self._layout, self._current = layout, current
        self._change = np.zeros(layout.num_parameters, np.float32)
        self._scaled_sum = np.zeros(layout.num_parameters, np.float32) if scaled_sum else None
        self._moments = np.zeros(layout.num_buffers, np.float64)
        self._largest = np.full(layout.num_buffers, -np.inf, np.float32)
        self._scratch = np.empty(CHUNK, np.float32)
        self.total = 0.0

    def add(self, weights: Weights, weight: float, *, scale: float = 1.0, factor: float = 0.0) -> None:
        """Add one site's network with its weight; `scale` is of its change alone. `weights` is only read.

        `factor` is what the change is multiplied by, without weight and scale, in the scaled sum.
        """
        for part in chunks(self._change.size):
            sent = self._current.parameters[part]
            change = np.subtract(weights.parameters[part], sent, out=self._scratch[: len(sent)])
            saxpy(change, self._change[part], a=weight * scale)  # in place; numpy needs two passes for it
            if self._scaled_sum is not None:
                saxpy(change, self._scaled_sum[part], a=factor)
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
        return Aggregate(change=self._change, buffers=buffers, scaled_sum=self._scaled_sum)


def chunks(size: int) -> Iterator[slice]:
    """Where the pieces of a long vector lie."""
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))
