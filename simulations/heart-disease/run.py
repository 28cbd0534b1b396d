"""Run the heart disease comparison and write its table into README.md.

`python run.py DATA OUT` reads `DATA/tabular/dev/heart_disease_4hospitals.csv`, tunes on the training patients alone,
runs the comparison, and replaces the table of this folder's README.md, which also says what was decided beforehand.
What was run before with the same settings is reused.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))

from readme import Found, comparisons, difference, number, put, spread  # noqa: E402  # lies beside the simulations

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va_long_beach")
GRID: Mapping[str, tuple[float | str, ...]] = {
    "train.learning-rate": (0.03, 0.1, 0.3, 1.0),
    "train.local-epochs": (1, 4),
    "strategy.weight-by": ("images", "uniform"),
}
ONE_NETWORK = ("fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "fednova")
FEDERATED = (*ONE_NETWORK, "ditto")  # ditto ends with a network for each hospital
TUNING_SEEDS = 5
# One step on all of a site's patients a round: pooled gradient descent (docs/federated-equals-pooled.md)
ONE_STEP: Mapping[str, float | str] = {
    "train.batch-size": 1024,
    "train.rounds": 100,
    "train.local-epochs": 1,
    "strategy.weight-by": "images",
}
ONE_STEP_GRID = ("train.learning-rate", (0.1, 0.3, 1.0))
MARGIN = 0.02
FLAMBY = {"pooled": 0.795, "best single site": 0.784, "fedavg": 0.748, "best federated": 0.785}
Setting = Mapping[str, float | str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare local, federated and pooled training on heart disease.")
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder that holds tabular/dev")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for run files and experiments")
    parser.add_argument("--jobs", type=int, default=0, help="runs at once; 0 = as many as cores and memory allow")
    options = parser.parse_args(arguments)
    table = options.data.absolute() / "tabular" / "dev" / "heart_disease_4hospitals.csv"
    if not table.is_file():
        print(f"error: {table}: no such table", file=sys.stderr)
        return 1
    setting, tuned = tune(table, options.out, options.jobs)
    print(f"tuned: {dict(setting)}; {tuned}", flush=True)
    report = experiment(options.out, "compare", table, setting, options.jobs)
    steps, one_step = in_one_step(table, options.out, options.jobs)
    put(HERE / "README.md", "run.py", f"{text_of(report, setting, tuned)}\n{beside_pooled(one_step, steps)}")
    print(f"wrote {HERE / 'README.md'}; page: {options.out / 'compare' / 'comparison.html'}")
    return 0


def tune(table: Path, out: Path, jobs: int) -> tuple[Setting, dict[str, float]]:
    """The setting of the grid with the best mean of FedAvg's and pooled accuracy, and every arm's accuracy with it.

    All of it on a quarter of the training patients of five splits; the first of equals is taken.
    """
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    found = [tuning(table, out, jobs, point, ("fedavg", "pooled")) for point in points]
    for point, of in zip(points, found, strict=True):
        print("tuning folds:", *(f"{key} {value}" for key, value in {**point, **of}.items()), flush=True)
    best = max(range(len(points)), key=lambda place: sum(found[place].values()))
    return points[best], tuning(table, out, jobs, points[best], (*FEDERATED, "pooled"))


def in_one_step(table: Path, out: Path, jobs: int) -> tuple[Setting, Found]:
    """FedAvg with one full-batch step a round against pooled training of as many steps, tuned as the others are."""
    key, values = ONE_STEP_GRID
    points: list[Setting] = [{**ONE_STEP, key: value} for value in values]
    found = [tuning(table, out, jobs, point, ("fedavg", "pooled")) for point in points]
    best = points[max(range(len(points)), key=lambda place: sum(found[place].values()))]
    arms = {"evaluate.compare": ("fedavg", "pooled"), "evaluate.family": ("fedavg vs pooled",)}
    return best, experiment(out, "one-step", table, {**best, **arms}, jobs)


def tuning(table: Path, out: Path, jobs: int, setting: Setting, arms: Sequence[str]) -> dict[str, float]:
    """The accuracy of some arms on the tuning folds."""
    keys = {"evaluate.seeds": TUNING_SEEDS, "evaluate.bootstrap": 0, "evaluate.compare": arms, "evaluate.family": ()}
    report = experiment(out, "tune", table, {**setting, **keys}, jobs)
    return {arm["arm"]: arm["endpoint"]["value"] for arm in report["arms"]}


def experiment(out: Path, name: str, table: Path, keys: Mapping[str, Any], jobs: int) -> Found:
    """Write a run file of the four hospitals with some keys changed, and run `fedmed compare` on it, in this process.

    "tune" holds out none but training patients of the "compare" of the same seed.
    """
    from fedmed import config
    from fedmed.experiments.compare import compare
    from fedmed.reporting.comparison import write_comparison

    values = tomllib.loads((HERE / "heart.toml").read_text(encoding="utf-8"))
    folder = "tune" if name == "tune" else ""
    values["data"]["sites"] = [str(table / folder / hospital) for hospital in HOSPITALS]
    for dotted, value in keys.items():
        section, _, key = dotted.partition(".")
        values[section][key] = list(value) if isinstance(value, tuple) else value
    path = out.absolute() / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    report = compare(config.load(path), out.absolute() / name, jobs=jobs)
    write_comparison(out.absolute() / name)
    return report


def text_of(report: Found, setting: Setting, tuned: Mapping[str, float]) -> str:
    """The results as Markdown."""
    rows = {arm["arm"]: arm for arm in report["arms"]}
    sites = [place["place"] for place in report["places"]]
    judged = [max(arms, key=lambda arm: tuned[arm]) for arms in (FEDERATED, ONE_NETWORK)]
    chosen = ", ".join(f"`{key} = {value}`" for key, value in setting.items())
    lines = [
        f"Chosen on tuning folds: {chosen}; `{judged[0]}` as the arm that is judged first and `{judged[1]}` as the one "
        f"with a single network. {len(report['seeds'])} seeds; "
        f"intervals: {report['intervals']}, {report['replicates']:,} resamples.",
        "",
        "| arm | tuning folds | accuracy, mean of the hospitals | " + " | ".join(sites) + " |",
        "|---|---|---|" + "---|" * len(sites),
    ]
    for name, arm in rows.items():
        cells = " | ".join(number(arm["places"][site]["value"]) for site in sites)
        before = f"{tuned[name]:.3f}" if name in tuned else ""
        lines.append(f"| {name} | {before} | {spread(arm['endpoint'])} | {cells} |")
    lines += ["", *comparisons(report)]
    return "\n".join([*lines, "", *verdict(report, judged), "", *beside_flamby(report, rows, sites)]) + "\n"


def verdict(report: Found, judged: Sequence[str]) -> list[str]:
    """Whether the arms that were chosen beforehand are shown to be as good as pooling, and which others would be."""
    against = {one["first"]: one for one in report["comparisons"] if one["second"] == "pooled"}
    lines = []
    roles = ("the best federated arm on tuning folds", "the best one of a single network")
    for arm, what in zip(judged, roles, strict=True):
        lines.append(f"* `{arm}`, {what}: against pooled {difference(against[arm])}, {limit(against[arm])}.")
    within = ", ".join(name for name, one in against.items() if shown(one)) or "none"
    return [*lines, f"* All arms whose lower limit is above −{MARGIN}, chosen or not: {within}."]


def shown(one: Found) -> bool:
    """Whether a comparison shows that its first arm loses less than the margin."""
    return one["low"] is not None and bool(one["low"] > -MARGIN)


def limit(one: Found) -> str:
    """The lower limit of a comparison beside the margin, in words."""
    if one["low"] is None:
        return "the same on every resample, so without an interval"
    return f"lower limit **{'above' if shown(one) else 'not above'} −{MARGIN}**"


def beside_pooled(report: Found, setting: Setting) -> str:
    """FedAvg of one full-batch step a round, and pooled training."""
    arms = ", ".join(f"`{arm['arm']}` {spread(arm['endpoint'])}" for arm in report["arms"])
    (one,) = report["comparisons"]
    chosen = ", ".join(f"`{key} = {value}`" for key, value in setting.items())
    return f"One full-batch step a round ({chosen}): {arms}; difference {difference(one)}, {limit(one)}."


def beside_flamby(report: Found, arms: Mapping[str, Found], sites: Sequence[str]) -> list[str]:
    """FLamby's table beside this one."""
    single = {site: mean_at_all(report, f"local:{site}", sites) for site in HOSPITALS}
    best = max(single, key=lambda site: single[site])
    top = max(ONE_NETWORK, key=lambda name: arms[name]["endpoint"]["value"])
    ours = {
        "pooled": arms["pooled"]["endpoint"]["value"],
        "best single site": single[best],
        "fedavg": arms["fedavg"]["endpoint"]["value"],
        "best federated": arms[top]["endpoint"]["value"],
    }
    notes = {"best single site": f" ({best})", "best federated": f" ({top})"}
    rows = [f"| {name} | {value:.3f} | {ours[name]:.3f}{notes.get(name, '')} |" for name, value in FLAMBY.items()]
    return ["| | FLamby's table | here, another split |", "|---|---|---|", *rows]


def mean_at_all(report: Found, network: str, sites: Sequence[str]) -> float:
    """The accuracy of one network, averaged over all hospitals."""
    cells = {
        cell["place"]: cell["metrics"]["accuracy"]["value"] for cell in report["matrix"] if cell["network"] == network
    }
    return float(sum(cells[site] for site in sites) / len(sites))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # no thread may be there when a run is forked
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    sys.exit(main())
