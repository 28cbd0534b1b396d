"""Run the heart disease comparison and write its table into README.md.

`python run.py DATA OUT` reads `DATA/tabular/dev/heart_disease_4hospitals.csv`, calls `fedmed sweep` on the training
patients alone and then `fedmed compare`, and replaces the table of this folder's README.md. What was run before with
the same settings is reused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

HERE = Path(__file__).absolute().parent
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va_long_beach")
GRID = ("train.learning-rate=0.03,0.1,0.3", "train.rounds=10,30,100")
BEGIN, END = "<!-- begin: run.py -->", "<!-- end: run.py -->"
FLAMBY = {"pooled": 0.795, "best single site": 0.784, "fedavg": 0.748, "best federated": 0.785}
Found = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare local, federated and pooled training on heart disease.")
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder that holds tabular/dev")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for run files and experiments")
    options = parser.parse_args(arguments)
    table = options.data.absolute() / "tabular" / "dev" / "heart_disease_4hospitals.csv"
    if not table.is_file():
        print(f"error: {table}: no such table", file=sys.stderr)
        return 1
    tuned = tune(table, options.out)
    report = fedmed(
        "compare", write_run(options.out / "compare.toml", table, "", tuned), "--out", options.out / "compare"
    )
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{text_of(report, tuned)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"wrote {readme}; page: {options.out / 'compare' / 'comparison.html'}")
    return 0


def tune(table: Path, out: Path) -> dict[str, float]:
    """The setting with the best mean accuracy of FedAvg on a quarter of each seed's training patients."""
    run = write_run(out / "tune.toml", table, "tune", {"evaluate.seeds": 5, "evaluate.bootstrap": 0})
    varied = [word for each in GRID for word in ("--vary", each)]
    points = fedmed("sweep", run, *varied, "--out", out / "tune")["points"]
    best = max(points, key=lambda point: (point["endpoint"]["value"], -point["values"]["train.rounds"]))
    return dict(best["values"])


def write_run(path: Path, table: Path, folder: str, keys: dict[str, float]) -> Path:
    """A run file of the four hospitals with some keys changed."""
    values = tomllib.loads((HERE / "heart.toml").read_text(encoding="utf-8"))
    values["data"]["sites"] = [str(table / folder / hospital) for hospital in HOSPITALS]
    for dotted, value in keys.items():
        section, _, key = dotted.partition(".")
        values[section][key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def fedmed(*words: object) -> Found:
    """What a command of fedmed prints with --json."""
    command = [sys.executable, "-m", "fedmed", *map(str, words), "--json"]
    paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: Found = json.loads(done.stdout)
    return found


def text_of(report: Found, tuned: dict[str, float]) -> str:
    """The results as Markdown."""
    arms = {arm["arm"]: arm for arm in report["arms"]}
    sites = [place["place"] for place in report["places"]]
    single = {site: mean_at_all(report, f"local:{site}", sites) for site in HOSPITALS}
    best = max(single, key=lambda site: single[site])
    federated = {name: arm for name, arm in arms.items() if arm["kind"] == "federated"}
    top = max(federated, key=lambda name: federated[name]["endpoint"]["value"])
    chosen = ", ".join(f"`{key} = {value:g}`" for key, value in tuned.items())
    lines = [
        f"Chosen on training patients: {chosen}. {len(report['seeds'])} seeds; intervals: {report['intervals']}, "
        f"{report['replicates']:,} resamples.",
        "",
        "| arm | accuracy, mean of the hospitals | " + " | ".join(sites) + " | worst hospital |",
        "|---|---|" + "---|" * (len(sites) + 1),
    ]
    for name, arm in arms.items():
        cells = " | ".join(f"{arm['places'][site]['value']:.3f}" for site in sites)
        lines.append(f"| {name} | {spread(arm['endpoint'])} | {cells} | {arm['worst']['value']:.3f} |")
    lines += ["", "| comparison | difference | p | p, Holm |", "|---|---|---|---|"]
    for one in report["comparisons"]:
        difference = f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
        lines.append(f"| {one['first']} − {one['second']} | {difference} | {one['p']:.3f} | {one['p_holm']:.3f} |")
    ours = {
        "pooled": arms["pooled"]["endpoint"]["value"],
        "best single site": single[best],
        "fedavg": arms["fedavg"]["endpoint"]["value"],
        "best federated": federated[top]["endpoint"]["value"],
    }
    notes = {"best single site": f" ({best})", "best federated": f" ({top})"}
    lines += ["", "| | FLamby's table | here, another split |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3f} | {ours[name]:.3f}{notes.get(name, '')} |" for name, value in FLAMBY.items()]
    return "\n".join(lines) + "\n"


def mean_at_all(report: Found, network: str, sites: Sequence[str]) -> float:
    """The accuracy of one network, averaged over all hospitals."""
    cells = {
        cell["place"]: cell["metrics"]["accuracy"]["value"] for cell in report["matrix"] if cell["network"] == network
    }
    return float(sum(cells[site] for site in sites) / len(sites))


def spread(found: Found) -> str:
    """A value and its interval."""
    return f"{found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
