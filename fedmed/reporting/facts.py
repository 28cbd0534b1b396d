"""What a report knows of a run, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One metric with its 95 % interval. None is "undefined"; for `patients` also "suppressed"."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    patients: int | None = None


Metrics = Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What a site spent."""

    epsilon: float | None
    epsilon_total: float | None
    delta: float | None
    unit: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """One hospital: its size, its part in the run, and the final network at its held-out patients."""

    name: str
    patients: int | None
    images: int | None
    rounds_joined: int | None
    metrics: Metrics
    privacy: Privacy | None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round; number 0 is the initial network."""

    number: int
    joined: frozenset[str]
    failed: Mapping[str, str]  # site -> reason
    seconds: float | None
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the server's held-out patients show beyond single numbers."""

    kind: str  # classification | segmentation
    curves: Mapping[str, tuple[list[float], list[float]] | None] = field(default_factory=dict)  # label -> (FPR, TPR)
    cases: Mapping[str, list[float]] = field(default_factory=dict)  # label -> Dice of every case


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that the report shows."""

    folder: str
    run_id: str
    name: str
    status: str
    reason: str
    model: str
    task: str
    strategy: str
    rounds: int | None
    seed: int | None
    versions: Mapping[str, str]
    server: Metrics
    sites: tuple[Site, ...]
    log: tuple[Round, ...]
    timing: Mapping[str, float | None]
    peak_memory_mib: float | None
    primary: str
    privacy_mode: str
    void_privacy: bool  # test noise: no ε may be claimed
    started: str
    finished: str
    unfinished: Mapping[tuple[str, int], str]  # (site, round) -> reason, for a round that never reached the log
    evaluation: Evaluation | None
    notes: tuple[str, ...]  # files that could not be read
