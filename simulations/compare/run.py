"""Prepare the comparisons, run `fedmed compare` on them, and write their tables into README.md.

`python run.py DATA OUT` needs nothing else. What was run before with the same settings is reused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import prepare

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent))

from readme import Found, comparisons, fedmed, number, put, spread  # noqa: E402  # lies beside the simulations

NAMES = ("classification", "nih", "lungs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare local, federated and pooled training on real chest X-rays.")
    parser.add_argument("data", metavar="DATA", help="the folder that holds cxr/dev and seg2d/dev")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for manifests and experiments")
    parser.add_argument("--only", choices=NAMES, help="one of the comparisons")
    parser.add_argument("--seeds", type=int, default=0, help="of every arm; 0 = as in the run file")
    options = parser.parse_args(arguments)
    words = ["--set", f"evaluate.seeds={options.seeds}"] if options.seeds else []
    if prepare.main([options.data, str(options.out)]):
        return 1
    for name in [options.only] if options.only else NAMES:
        run, folder = options.out / name / "run.toml", options.out / f"{name}-experiment"
        report = fedmed("compare", run, *words, "--out", folder)
        put(HERE / "README.md", name, text_of(report))
        print(f"wrote the table of {name}; page: {folder / 'comparison.html'}")
    return 0


def text_of(report: Found) -> str:
    """The results as Markdown: a row for each arm, the held-out patients, and the declared comparisons."""
    sites = [place["place"] for place in report["places"]]
    people = [place["patients"] or "< 10" for place in report["places"]]
    seeds = len(report["seeds"])
    lines = [
        f"{seeds} seed{'s' if seeds > 1 else ''}; 95 % intervals: {report['intervals']}, {report['replicates']:,} "
        "resamples.",
        "",
        f"| arm | {report['primary']}, mean of the hospitals | " + " | ".join(sites) + " |",
        "|---|---|" + "---|" * len(sites),
        "| held-out patients | | " + " | ".join(map(str, people)) + " |",
    ]
    for arm in report["arms"]:
        cells = " | ".join(number(arm["places"][site]["value"]) for site in sites)
        lines.append(f"| {arm['arm']} | {spread(arm['endpoint'])} | {cells} |")
    return "\n".join([*lines, "", *comparisons(report), *(f"\nNote: {note}." for note in report["notes"])])


if __name__ == "__main__":
    sys.exit(main())
