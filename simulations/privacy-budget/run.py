"""Run two privacy-budget experiments, and write their tables into README.md and their plots into OUT.

`python run.py OUT` needs no data: phantoms of 10 to 10,000 patients a hospital. `--nih DATA` runs the chest X-rays
instead. What was run before is reused.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))

from readme import Found, fedmed, number, put, spread  # noqa: E402  # lies beside the simulations

EPSILONS = ("1.0", "3.0", "6.0", "10.0")
NETWORKS, UNITS = ("small-cnn", "chexnet"), ("patient", "image")
PATIENTS = (10, 30, 100, 300, 1000, 3000, 10_000)  # of each phantom hospital
SITES = ("site-1", "site-2")
STEPS_A_PASS = 16  # whatever the number of patients: the mean batch is patients / 16
TRUNK_PATIENTS, SEED, TRUNK_SEED = 1000, 11, 12  # the trunk learns from patients whom nobody else has
TRUNK_LABELS = "nodule,cavity,reticulation"  # one finding less, so that its head is of no use and a new one is made
LARGEST_LOSS = 0.03
Row = Mapping[str, Found]  # arm to its endpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two; returns the exit status."""
    parser = argparse.ArgumentParser(description="What differential privacy costs, by ε and by number of patients.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for data and experiments")
    parser.add_argument("--nih", metavar="DATA", type=Path, help="the folder that holds cxr/dev: run the chest X-rays")
    parser.add_argument("--seeds", type=int, default=0, help="of every point; 0 = as in the run file")
    parser.add_argument("--patients", type=int, nargs="+", default=PATIENTS, help="of each phantom hospital")
    options = parser.parse_args(arguments)
    more = ("--set", f"evaluate.seeds={options.seeds}") if options.seeds else ()
    if options.nih:
        rows = nih(options.nih, options.out, more)
        put(HERE / "README.md", "nih", nih_table(rows))
        plot(
            {name: dict(zip(("∞", *EPSILONS), points, strict=True)) for name, points in rows.items()},
            "ε",
            options.out / "nih.html",
        )
    else:
        found = phantoms(options.out, options.patients, more)
        put(HERE / "README.md", "phantoms", phantom_table(found))
        arms = next(iter(found.values()))
        plot(
            {arm: {str(count): row[arm] for count, row in found.items()} for arm in arms},
            "patients of each hospital",
            options.out / "phantoms.html",
        )
    print(f"wrote the table into {HERE / 'README.md'} and the plot into {options.out}")
    return 0


def nih(data: Path, out: Path, more: Sequence[str]) -> dict[str, list[Found]]:
    """The endpoint for every network and unit: without privacy first, then by ε."""
    folder = out / "nih"
    subprocess.run([sys.executable, HERE.parent / "nih-resolution" / "prepare.py", data, folder], check=True)
    shutil.copyfile(HERE / "nih.toml", folder / "run.toml")
    networks = ("--vary", f"model.name={','.join(NETWORKS)}")
    grid = ("--vary", f"privacy.unit={','.join(UNITS)}", "--vary", f"privacy.epsilon={','.join(EPSILONS)}")
    plain = fedmed("sweep", folder / "run.toml", *networks, *more, "--out", out / "nih-plain")
    private = fedmed(
        *("sweep", folder / "run.toml", *networks, *grid, *more),
        *("--set", "privacy.mode=dp-sgd", "--out", out / "nih-private"),
    )
    without = {point["values"]["model.name"]: point["endpoint"] for point in plain["points"]}
    rows: dict[str, list[Found]] = {}
    for point in private["points"]:
        name, unit = point["values"]["model.name"], point["values"]["privacy.unit"]
        rows.setdefault(f"{name}, {unit}", [without[name]]).append(point["endpoint"])
    return rows


def phantoms(out: Path, patients: Sequence[int], more: Sequence[str]) -> dict[int, Row]:
    """The endpoint by number of patients and arm."""
    made, trunk = out / f"phantoms-{max(patients)}", out / "trunk"
    for folder, count, seed in ((made, max(patients), SEED), (trunk, TRUNK_PATIENTS, TRUNK_SEED)):
        if not folder.exists():
            words = ("--sites", len(SITES), "--patients", count, "--seed", seed)
            command = [sys.executable, "-m", "fedmed", "data", "synth", folder, *words]
            subprocess.run([*map(str, command)], check=True)
    weights = pretrained(trunk, out)
    found: dict[int, Row] = {}
    for count in patients:
        folder = out / f"first-{count}"
        first_patients(made, folder, count)
        words = ("sweep", folder / "run.toml", "--set", f"train.batch-size={math.ceil(count / STEPS_A_PASS)}", *more)
        modes = ("--vary", "privacy.mode=none,dp-sgd")
        head = ("--set", f"model.weights={weights}", "--set", "model.freeze=block4")
        scratch = fedmed(*words, *modes, "--out", out / f"scratch-{count}")["points"]
        tuned = fedmed(*words, *modes, *head, "--out", out / f"head-{count}")["points"]
        found[count] = {
            "no privacy": scratch[0]["endpoint"],
            "ε = 3": scratch[1]["endpoint"],
            "given trunk, no privacy": tuned[0]["endpoint"],
            "given trunk, ε = 3": tuned[1]["endpoint"],
        }
    return found


def pretrained(trunk: Path, out: Path) -> Path:
    """The weights of a network that was trained without privacy on other phantoms and three of the four findings."""
    shutil.copyfile(HERE / "phantoms.toml", trunk / "run.toml")
    run = out / "trunk-run"
    if not (run / "result.json").exists():
        batch = f"train.batch-size={math.ceil(TRUNK_PATIENTS / STEPS_A_PASS)}"
        words = ("--set", batch, "--set", f"task.labels={TRUNK_LABELS}")
        fedmed("simulate", trunk / "run.toml", *words, "--out", run)
    return run / "model.safetensors"


def first_patients(made: Path, folder: Path, count: int) -> None:
    """Manifests of the first patients of every hospital; all of the server's."""
    for site in (*SITES, "server"):
        with (made / site / "manifest.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        kept = list(dict.fromkeys(row["patient_id"] for row in rows))
        among = set(kept if site == "server" else kept[:count])
        (folder / site).mkdir(parents=True, exist_ok=True)
        with (folder / site / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            for row in rows:
                if row["patient_id"] in among:
                    writer.writerow({**row, "image": os.path.relpath(made / site / row["image"], folder / site)})
    shutil.copyfile(HERE / "phantoms.toml", folder / "run.toml")


def nih_table(rows: Mapping[str, Sequence[Found]]) -> str:
    """A row for each network and unit, a column for each ε."""
    heads = ["no privacy", *(f"ε = {float(epsilon):g}" for epsilon in EPSILONS)]
    lines = [f"| network, unit | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(spread, points))} |" for name, points in rows.items()])


def phantom_table(found: Mapping[int, Row]) -> str:
    """A row for each number of patients, and from how many on privacy costs little."""
    arms = list(next(iter(found.values())))
    lines = [f"| patients of each hospital | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    lines += [f"| {count:,} | {' | '.join(spread(row[arm]) for arm in arms)} |" for count, row in found.items()]
    for plain, private, words in ((arms[0], arms[1], "From scratch"), (arms[2], arms[3], "With the given trunk")):
        lost = {count: row[plain]["value"] - row[private]["value"] for count, row in found.items()}
        few = [count for count in lost if all(lost[more] < LARGEST_LOSS for more in lost if more >= count)]
        least = f"from {min(few):,} patients a hospital on" if few else "at none of these numbers of patients"
        costs = ", ".join(number(loss) for loss in lost.values())
        lines += ["", f"{words}, ε = 3 costs less than {LARGEST_LOSS} of AUROC {least} (lost: {costs})."]
    return "\n".join(lines)


def plot(lines: Mapping[str, Mapping[str, Found]], axis: str, path: Path) -> None:
    """Write one line with 95 % intervals for every arm."""
    figure = go.Figure()
    for name, points in lines.items():
        values = [point["value"] for point in points.values()]
        above = [(point["high"] or point["value"]) - point["value"] for point in points.values()]
        below = [point["value"] - (point["low"] or point["value"]) for point in points.values()]
        errors = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        figure.add_trace(go.Scatter(x=list(points), y=values, error_y=errors, name=name, mode="lines+markers"))
    figure.update_layout(xaxis={"title": axis, "type": "category"}, yaxis_title="AUROC at the server's patients")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    sys.exit(main())
