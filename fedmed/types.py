"""The values that pass between rooms: layouts, tasks, updates, frozen; numpy only. And how ε and times are written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatVector = NDArray[np.float32]
Sums = Mapping[str, NDArray[np.float64]]  # named sums that add up over sites: counts, histograms, losses
Scalar = str | int | float | bool
Event = Mapping[str, Any]  # a line of events.jsonl: "time", "round", "kind", and more by kind
OnProgress = Callable[[int, int], None]  # is told (how many are done, of how many)
SMALL = 10  # patients below whom no count is told, as it comes close to single ones


def now() -> str:
    """The present time as RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a network and where it lies in its flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    integer: bool = False  # an integer buffer such as BatchNorm's num_batches_tracked

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def span(self) -> slice:
        """Where the entry lies in the flat vector."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Layout:
    """How a network becomes two flat float32 vectors: `parameters` (trained) and `buffers` (e.g. BatchNorm statistics).

    Both sides derive it from the network that they build; the hash travels with every message, so that a site and a
    server that built different networks refuse each other instead of averaging noise.
    """

    parameters: tuple[Entry, ...]
    buffers: tuple[Entry, ...]

    @property
    def num_parameters(self) -> int:
        """Length of the parameter vector."""
        return sum(entry.size for entry in self.parameters)

    @property
    def num_buffers(self) -> int:
        """Length of the buffer vector."""
        return sum(entry.size for entry in self.buffers)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, shapes and kinds, in order."""
        facts = [[[e.name, e.shape, e.integer] for e in group] for group in (self.parameters, self.buffers)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A network's state as two flat vectors. Vectors are shared, never changed in place."""

    parameters: FloatVector  # (layout.num_parameters,)
    buffers: FloatVector  # (layout.num_buffers,)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Who hides in one secure sum."""

    attempt: int  # later ones have larger numbers; masks are for one attempt
    keys: Mapping[str, tuple[str, str]]  # by site: its public key for the run and its signature of it, hexadecimal
    joined: tuple[str, ...] = ()  # in a task to open the sum: whose updates are in it


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the server asks of a site in one round. It never names a file at the site."""

    kind: Literal["train", "evaluate", "unmask"]
    round: int  # 1-based; 0 asks about the initial network
    settings: str  # the run configuration without its `data` section, as JSON
    layout: str  # Layout.hash of the server's network
    weights: Weights
    learning_rate_factor: float = 1.0  # what a plateau of the server's metric has come to
    centres: tuple[float, ...] = ()  # around which score histograms are finest, one per label; empty = 0
    vectors: Mapping[str, FloatVector] = field(default_factory=lambda: MappingProxyType({}))  # e.g. SCAFFOLD's control
    evaluate: bool = True  # whether a train reply also evaluates the received network at the site
    run: str = ""  # tells runs with equal settings apart; a resumed run keeps it
    masking: Masking | None = None  # with strategy.secure-sum
    counted: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # by site: its last used round


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """A release that touched patients' data under differential privacy: what happened, from which any ε follows."""

    mechanism: Literal["gaussian", "sampled-gaussian"]
    noise_multiplier: float  # σ: standard deviation of the noise / sensitivity
    sample_rate: float = 1.0  # q of the Poisson sampling of units, 1 where everyone takes part
    steps: int = 1
    unit: Literal["patient", "image", "site"] = "patient"
    images_per_patient: int = 1  # the cap k on what one patient contributes to a step
    release: Literal["gradients", "metrics", "count", "update"] = "gradients"
    cohort: str = ""  # a keyed digest that names the set of patients


@dataclass(frozen=True, kw_only=True)
class Update:
    """The one thing that leaves a site."""

    weights: Weights | None  # None in the reply to an evaluation, and under masks
    layout: str
    num_examples: int
    metrics: Sums = field(default_factory=lambda: MappingProxyType({}))
    masked: NDArray[np.uint64] | None = None  # in a secure sum, in place of weights: parameters, then buffers
    facts: Mapping[str, Scalar] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def encoding(self) -> Literal["float32", "ring64"]:
        """What stands for the network: its float32 values, or whole numbers modulo 2⁶⁴ under masks."""
        return "float32" if self.masked is None else "ring64"


def rounded_up(value: float, decimals: int) -> str:
    """A number as text, never less than it is: no ε is shown below what was spent, and no σ below what keeps a budget.

    A millionth of the last decimal does not count, so that 1.1, which a float holds as a little more, is 1.10.
    """
    if math.isinf(value):
        return str(value)
    scale = 10**decimals
    return f"{math.ceil(round(value * scale, 6)) / scale:.{decimals}f}"
