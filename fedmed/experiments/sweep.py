"""`fedmed sweep`: a grid of settings, every point with several seeds, in one tidy table."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.durable import write_atomically, write_json
from fedmed.errors import ConfigError, RunFailed
from fedmed.experiments.arms import Trial, bases_of, changed, check_judged_everywhere, plain, seeds_of
from fedmed.experiments.dealing import dealt
from fedmed.experiments.judging import UNTOLD, Bench, Drawn, check_same_split, intervals_of, mean_of, site_places
from fedmed.experiments.predictions import SERVER, check_endpoint, read_predictions
from fedmed.experiments.reuse import result_of
from fedmed.experiments.running import Said, run_trials
from fedmed.federated.phantoms import with_phantoms

RESULT, TABLE, FAILED = "sweep.json", "sweep.csv", "failed"
JUDGING = tuple(f"evaluate.{key}" for key in ("primary", "endpoint", "resplit", "compare", "family"))
FIXED = ("name", "data.sites", "data.server", "seed", "evaluate.seeds", "evaluate.split-seed", *JUDGING)
Value = str | int | float | bool
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One choice of every varied key."""

    values: Mapping[str, Value]
    config: RunConfig

    @property
    def label(self) -> str:
        """`train.rounds=3 model.width=8`."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def points_of(config: RunConfig, vary: Sequence[str], home: Path = Path()) -> tuple[Point, ...]:
    """Every point of the grid, in the order given, the last key varying fastest.

    Args:
        config: what all points share, with every path absolute.
        vary: `KEY=a,b,c` each.
        home: that paths among the values are relative to: the run file's folder.

    Raises:
        ConfigError: a key is unknown, named twice or not to be varied, or a value cannot work.
    """
    axes: dict[str, list[str]] = {}
    for text in vary:
        key, equals, values = text.partition("=")
        choices = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not choices:
            raise ConfigError(f"--vary {text}: expected KEY=a,b,c, such as train.learning-rate=1e-2,1e-3")
        if key in axes:
            raise ConfigError(f"--vary {key} is given twice; name all its values at once")
        if key in FIXED:
            hint = "evaluate.seeds repeats every point with several seeds"
            hint = "all points are judged alike; set it in the run file" if key in JUDGING else hint
            raise ConfigError(f"--vary {key}: cannot be varied; {hint}")
        axes[key] = choices
    if not axes:
        raise ConfigError("--vary is missing: name a key and its values, such as --vary train.rounds=2,4,8")
    points = []
    for choice in itertools.product(*axes.values()):
        assignments = [f"{key}={value}" for key, value in zip(axes, choice, strict=True)]
        found = run_file.validate(
            run_file.override(run_file.nested(config), assignments), source="a point of the sweep"
        )
        flat = run_file.flatten(found)
        points.append(Point(values={key: flat[key] for key in axes}, config=run_file.resolve_paths(found, home)))
    return tuple(points)


def trials_of(points: Sequence[Point]) -> tuple[Trial, ...]:
    """Every run of a sweep."""
    found = []
    for point in points:
        for seed, base in bases_of(point.config).items():
            trained = changed(base, {}, seed=seed)
            found.append(Trial(arm=point.label, network=point.label, seed=seed, config=trained, judges=base))
    check_judged_everywhere(found)
    return tuple(found)


def sweep(
    config: RunConfig,
    vary: Sequence[str],
    folder: Path,
    *,
    home: Path = Path(),
    jobs: int = 0,
    watch: Said = lambda standing: None,
) -> dict[str, Any]:
    """Run a grid, and write `sweep.json` and `sweep.csv`. A run that fails has no value there, and ends no other.

    Args:
        config: what all points share, with every path absolute; phantom hospitals if it names no sites.
        vary: `KEY=a,b,c` each.
        folder: of the experiment; finished runs in it are reused.
        home: that paths among the values are relative to: the run file's folder.
        jobs: runs at once; 0 = as many as cores and memory allow.
        watch: called whenever the grid has come further.

    Returns:
        The content of `sweep.json` (docs/sweep.md).

    Raises:
        FedmedError: a key or a value cannot work, or the data cannot be used.
    """
    config = with_phantoms(config, explicit=run_file.explicit_keys(config))
    points = [replace(point, config=dealt(point.config, folder)) for point in points_of(config, vary, home)]
    for point in points:
        check_endpoint(point.config)
    lost: dict[Path, str] = {}
    paths = run_trials(trials_of(points), folder, jobs=jobs, watch=watch, failed=lost.__setitem__)
    summary, rows = [], []
    for point in points:
        runs = {(point.label, seed): paths[point.label, seed] for seed in seeds_of(point.config)}
        summary.append({"values": dict(point.values), **_summary(point, runs, lost.keys())})
        for (_, seed), path in runs.items():
            found = [{"status": FAILED, "place": None, "metric": None, **UNTOLD}] if path in lost else _rows(path)
            rows += [{**point.values, "seed": seed, "run": path.name, **row} for row in found]
    report = {
        "schema": 1,
        "name": config.name,
        "primary": config.primary,
        "endpoint": config.evaluate.endpoint,
        "keys": list(points[0].values),
        "seeds": list(seeds_of(config)),
        "intervals": intervals_of(config.evaluate.seeds),
        "points": summary,
        "failures": [{"run": path.name, "reason": why} for path, why in lost.items()],
        "rows": rows,
    }
    write_json(folder / RESULT, report)
    write_atomically(folder / TABLE, _csv(rows).encode())
    return report


def _summary(point: Point, runs: Mapping[tuple[str, int], Path], lost: Set[Path]) -> dict[str, Any]:
    """What is told of a point: of seeds of which one failed no mean, which would be of those that went well."""
    if lost & set(runs.values()):
        names = [path.name for path in runs.values()]
        return {"status": FAILED, "endpoint": UNTOLD, "by_seed": [None] * len(runs), "runs": names, "epsilon": None}
    degraded = any(_result(path)["status"] == "degraded" for path in runs.values())
    return {
        "status": "degraded" if degraded else "completed",
        **_judged(point, runs),
        "epsilon": _largest_epsilon(runs.values()),
    }


def _judged(point: Point, runs: Mapping[tuple[str, int], Path]) -> dict[str, Any]:
    """The primary metric of a point at the declared endpoint, over its seeds and the patients."""
    base = plain(point.config)
    bases = bases_of(point.config)
    judged = {key: read_predictions(path, bases[key[1]]) for key, path in runs.items()}
    if not point.config.evaluate.resplit:
        check_same_split(judged)
    bench = Bench(config=base, judged=judged, seeds=tuple(seed for _, seed in runs))
    places = next(iter(judged.values()))
    where = [SERVER] if point.config.evaluate.endpoint == "server" else site_places(places)
    if not where or not set(where) <= set(places):
        raise ConfigError("nobody is held out at the declared evaluate.endpoint, so the points cannot be judged")
    parts: list[Drawn] = [bench.drawn(point.label, place)[base.primary] for place in where]
    mean = mean_of(parts, together=True)
    names = [path.name for path in runs.values()]
    return {"endpoint": bench.estimate(mean), "by_seed": mean.by_seed, "runs": names}


def _largest_epsilon(paths: Iterable[Path]) -> float | None:
    """The largest ε that a site spent in any run of a point; None without differential privacy."""
    found = [
        site["privacy"]["epsilon"]
        for path in paths
        for site in _result(path)["sites"]
        if site["privacy"] and site["privacy"].get("epsilon") is not None
    ]
    return max(found, default=None)


def _rows(path: Path) -> list[Row]:
    """One run as tidy rows: a line for every place and metric."""
    result = _result(path)
    places = [(SERVER, result["server"]["metrics"])] + [(site["site"], site["metrics"]) for site in result["sites"]]
    return [
        {"status": result["status"], "place": place, "metric": name}
        | {key: found.get(key) for key in ("value", "low", "high", "n")}
        for place, metrics in places
        for name, found in metrics.items()
    ]


def _result(path: Path) -> dict[str, Any]:
    result = result_of(path)
    if result is None:
        raise RunFailed(f"{path.name}: the run folder has no finished result; was it changed meanwhile?")
    return result


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
