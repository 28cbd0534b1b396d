"""Prepare the two federations, run them, and write their tables into README.md.

`python run.py DATA OUT` needs nothing else; runs that it made before are made anew. The classification runs three
times: with all hospitals, with the NIH sites alone, and with group norm in place of batch norm.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import prepare

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))

from readme import Found, fedmed, put  # noqa: E402  # lies beside the simulations

NIH_ALONE = "data.sites=" + ",".join(f"{site}/manifest.csv" for site in prepare.NIH_SITES)
RUNS = {
    "classification": ("classification",),
    "classification-nih": ("classification", "--set", NIH_ALONE),
    "classification-group": ("classification", "--set", "model.norm=group"),
    "lungs": ("lungs",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the federations of real chest X-rays and write their tables.")
    parser.add_argument("data", metavar="DATA", help="the folder that holds cxr/dev and seg2d/dev")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for manifests and runs")
    options = parser.parse_args(arguments)
    if prepare.main([options.data, str(options.out)]):
        return 1
    found = {}
    for name, (federation, *words) in RUNS.items():
        run, folder = options.out / federation / "run.toml", options.out / f"{name}-run"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            found[name] = fedmed("simulate", run, *words, "--out", folder)
        except subprocess.CalledProcessError:
            return 1
        print(f"{name}: {found[name]['status']} after {found[name]['timing']['total_s']:.0f} s", flush=True)
    server = options.out / "classification" / "server" / "manifest.csv"
    put(HERE / "README.md", "times", times(found))
    put(HERE / "README.md", "hospitals", hospitals(found["classification"]))
    put(HERE / "README.md", "labels", labels(found, positives(server)))
    put(HERE / "README.md", "lungs", lungs(found["lungs"]))
    return 0


def times(found: dict[str, Found]) -> str:
    """A row for each run."""
    lines = ["| run | status | seconds | peak memory, GiB |", "|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {name} | `{run['status']}` | {run['timing']['total_s']:.0f} | {run['peak_memory_mib'] / 1024:.1f} |"
            for name, run in found.items()
        ]
    )


def hospitals(run: Found) -> str:
    """What the final network is worth to every hospital's own held-out patients."""
    lines = [
        "| hospital | patients | images | held-out patients | AUROC, mean over labels | AUROC Pneumonia |",
        "|---|---|---|---|---|---|",
    ]
    for site in run["sites"]:
        mean, pneumonia = (site["metrics"].get(name, {}) for name in ("auroc", "auroc/Pneumonia"))
        counts = f"{site['patients']} | {site['images']} | {mean.get('n', '–')}"
        lines.append(f"| {site['site']} | {counts} | {shown(mean)} | {shown(pneumonia)} |")
    return "\n".join(lines)


def labels(found: dict[str, Found], patients: dict[str, int]) -> str:
    """The server's AUROC of each label, of the three classification runs."""
    lines = [
        "| label | positive patients | all hospitals | NIH sites alone | all hospitals, group norm |",
        "|---|---|---|---|---|",
    ]
    for label in ("", *prepare.NIH_LABELS):
        name = f"auroc/{label}" if label else "auroc"
        cells = [
            shown(found[run]["server"]["metrics"].get(name, {})) for run in RUNS if run.startswith("classification")
        ]
        lines.append(f"| {label or 'mean over labels'} | {patients.get(label, '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lungs(run: Found) -> str:
    """Dice and IoU at every hospital and at the server."""
    lines = ["| where | patients | images | judged on patients | Dice | IoU |", "|---|---|---|---|---|---|"]
    for where in run["sites"]:
        dice, iou = (where["metrics"].get(name, {}) for name in ("dice", "iou"))
        counts = f"{where['patients']} | {where['images']} | {dice.get('n', '–')}"
        lines.append(f"| {where['site']} | {counts} | {shown(dice, 3)} | {shown(iou, 3)} |")
    dice, iou = (run["server"]["metrics"][name] for name in ("dice", "iou"))
    return "\n".join([*lines, f"| server | | | {dice['n']} | {shown(dice, 3)} | {shown(iou, 3)} |"])


def positives(manifest: Path) -> dict[str, int]:
    """How many patients have an image with each label."""
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        label: len({row["patient_id"] for row in rows if row[label] and float(row[label]) == 1})
        for label in prepare.NIH_LABELS
    }


def shown(metric: Found, digits: int = 2) -> str:
    """A value, with its 95 % interval where there is one."""
    if metric.get("value") is None:
        return "null"
    interval = "" if metric.get("low") is None else f" ({metric['low']:.{digits}f}–{metric['high']:.{digits}f})"
    return f"{metric['value']:.{digits}f}{interval}"


if __name__ == "__main__":
    sys.exit(main())
