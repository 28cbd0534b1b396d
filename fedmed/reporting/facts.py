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
    bound: float | None = None  # how far a metric of histograms can be from that of the scores themselves
    noise: float | None = None  # how far noise moves it, 95 % of the time; None where it bears none


Metrics = Mapping[str, Estimate]


def metric_of(metrics: Metrics, name: str) -> Estimate:
    """What is known of a metric; nothing where nobody tells it."""
    return metrics.get(name, Estimate())


def usual_primary(task: str) -> str:
    """The primary metric of a run that names none, as the run configuration's default."""
    return "dice" if task == "segmentation" else "auroc"


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What a site spent."""

    epsilon: float | None
    epsilon_total: float | None
    delta: float | None
    unit: str
    adjacency: str = ""
    accountant: str = ""
    accountant_total: str = ""


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
class Curve:
    """A curve, and its 95 % band at other places; a band may be missing."""

    x: list[float]
    y: list[float]
    at: list[float | None] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    images: list[int] = field(default_factory=list)  # of a calibration curve, by point


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What one threshold makes of the test patients of a label."""

    probability: float | None
    chosen: bool  # on the selection patients; else it is ½
    cells: tuple[int | None, int | None, int | None, int | None]  # TP, FN, FP, TN
    rates: Metrics


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many images show a label and how many do not."""

    positives: int | None
    negatives: int | None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One case as a picture that stands in the page itself."""

    kind: str  # best | worst
    score: float | None
    outcome: str
    image: str  # a data URI


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the server's held-out patients show beyond single numbers."""

    kind: str  # classification | segmentation
    patients: int | None = None
    images: int | None = None
    counts: Mapping[str, Counts] = field(default_factory=dict)
    curves: Mapping[str, Curve | None] = field(default_factory=dict)  # label -> false and true positive rates
    precision_recall: Mapping[str, Curve | None] = field(default_factory=dict)
    calibration: Mapping[str, Curve | None] = field(default_factory=dict)
    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    cases: Mapping[str, list[float]] = field(default_factory=dict)  # label -> Dice of every case
    hd95: Mapping[str, list[float]] = field(default_factory=dict)  # mm
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a site found in its own house. A run's report shows counts and scanners of it, and never a picture."""

    site: str
    run: str
    model: str
    task: str
    primary: str
    round: int | None
    patients: int | None
    images: int | None
    held_out_patients: int | None
    held_out_items: int | None
    unreadable: int | None
    reasons: Mapping[str, int | None]
    scanners: tuple[tuple[str, int | None], ...]
    prevalence: Mapping[str, Counts]
    metrics: Metrics
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One network at a site's held-out patients, and what they gained over the site's own local network."""

    network: str
    reached: Estimate
    gain: Estimate | None


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
    findings: Mapping[str, Findings]  # by site; empty unless the sites are on this machine
    settings: Mapping[str, str]  # how it was trained
    notes: tuple[str, ...]  # files that could not be read
