"""`result.json` and `model.json`: the facts of a run as plain values. Undefined is None, never NaN."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedmed.config import RunConfig
from fedmed.federated.exchange import Failure
from fedmed.federated.identity import versions
from fedmed.federated.member import Member
from fedmed.federated.progress import Progress
from fedmed.federated.server_evaluation import Metrics
from fedmed.metrics import finite
from fedmed.models import build
from fedmed.training.network import layout_of

# Of [data], what model.json keeps: how an image becomes what the network sees
PREPROCESSING = {"preset", "image_size", "items", "spacing_mm", "volume_size", "dataset"}
Status = Literal["completed", "degraded", "paused", "failed"]


def metric(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
    *,
    bound: float | None = None,
) -> Any:
    """One metric as `result.json` holds it; with a bound if it was made of histograms."""
    exact = {"value": finite(value), "low": finite(low), "high": finite(high), "n": n}
    return exact if bound is None else {**exact, "bound": finite(bound)}


def metrics_json(metrics: Metrics) -> dict[str, Any]:
    """Metrics with intervals, by name."""
    return {name: each.to_json() for name, each in metrics.items()}


def summary_of(failures: Sequence[Failure]) -> str | None:
    """Who was dropped and why, in one line; None if nobody was."""
    reasons: dict[tuple[str, str], int] = {}
    for failure in failures:
        reasons[failure.site, failure.reason] = reasons.get((failure.site, failure.reason), 0) + 1
    times = {key: f" ({count} times)" if count > 1 else "" for key, count in reasons.items()}
    return "; ".join(f"{site}: {reason}{times[site, reason]}" for site, reason in reasons) or None


def build_result(
    config: RunConfig,
    progress: Progress,
    members: Sequence[Member],
    *,
    run_id: str,
    status: Status,
    reason: str | None,
    server_metrics: Mapping[str, Any],
    site_metrics: Mapping[str, Mapping[str, Any]],
    total_s: float,
    peak_mib: int,
    central: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole of `result.json`; `central` is what noise at the server has cost every site alike."""
    return {
        "schema": 1,
        "run_id": run_id,
        "name": config.name,
        "status": status,
        "reason": reason,
        "model": config.model.name,
        "task": config.task.kind,
        "strategy": config.strategy.name,
        "rounds": progress.round,
        "seed": config.seed,
        "versions": versions(),
        "server": {"metrics": dict(server_metrics), **({"privacy": dict(central)} if central else {})},
        "sites": [
            {
                "site": member.name,
                "patients": member.patients,
                "images": member.images if config.privacy.mode == "none" else None,
                "rounds_joined": progress.rounds_joined(member.name),
                "metrics": dict(site_metrics.get(member.name, {})),
                "privacy": dict(central) if central else progress.privacy.get(member.name),
            }
            for member in members
        ],
        "rounds_log": progress.log,
        "timing": {
            "total_s": round(total_s, 3),
            "train_s": round(progress.train_s, 3),
            "overhead_s": round(max(total_s - progress.train_s, 0.0), 3),
        },
        "peak_memory_mib": peak_mib,
    }


def model_facts(config: RunConfig, round: int, layout_hash: str, *, modalities: int = 0) -> dict[str, Any]:
    """`model.json`: how to build the network, what it predicts, and how its images are prepared.

    Corrections of low rank are merged into the network that is saved, so the plain one is described.

    Args:
        config: of the run.
        round: after which the network is kept.
        layout_hash: of the network that was trained.
        modalities: places in a row of the manifests; 0 = not known.
    """
    model = config.model.model_copy(update={"low_rank": 0, "weights": ""})
    if config.model.low_rank:
        plain = build(model, outputs=len(config.task.labels), seed=config.seed, dimensions=config.dimensions)
        layout_hash = layout_of(plain).hash
    return {
        "schema": 1,
        "model": model.model_dump(mode="json", by_alias=True, exclude={"weights"}),
        "task": {"kind": config.task.kind, "labels": list(config.task.labels)},
        "preprocessing": config.data.model_dump(mode="json", by_alias=True, include=PREPROCESSING),
        "modalities": modalities or None,
        "strategy": config.strategy.name,
        "round": round,
        "layout": layout_hash,
        "seed": config.seed,
        "fedmed": versions()["fedmed"],
    }


def peak_memory_mib(processes: Iterable[int] = ()) -> int:
    """Peak resident memory of this process plus that of the given ones, in MiB.

    Pages that forked processes share are counted in each of them, so this is an upper bound.
    """
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
    return int(total)
