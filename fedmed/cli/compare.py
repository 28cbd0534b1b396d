"""`fedmed compare`: local, federated and pooled training side by side."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedmed.config import RunConfig

MOST_SITES = 6  # columns of the terminal's table; all are in comparison.json and on the page


def compare(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="a run file; [evaluate] declares the comparison")],
    assignments: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key")] = [],  # noqa: B006  # typer reads the default and never changes it
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="the experiment's folder, to be reused")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="runs at once; 0 = as cores and memory allow")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print comparison.json at the end")] = False,
) -> None:
    """Train every site alone, federated and on pooled data, and judge all networks on the same held-out patients.

    Example: fedmed compare run.toml --set evaluate.compare=local,fedavg,pooled --out experiments/first
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = resolved(run, assignments)
    from fedmed.cli.experiment_progress import grid_progress
    from fedmed.experiments.compare import compare as run_comparison
    from fedmed.reporting import write_site_reports
    from fedmed.reporting.comparison import write_comparison

    folder = out or Path("runs") / f"{config.name}-experiment".replace(" ", "-")
    with grid_progress(quiet=quiet) as watch:
        report = run_comparison(config, folder, jobs=jobs, watch=watch)
    page = write_comparison(folder)
    write_site_reports(folder)  # what each site's own patients gained
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
        print(f"page: {page}")


def resolved(path: Path, assignments: list[str]) -> RunConfig:
    """A run file with its overrides, and phantom hospitals if it names no data."""
    from fedmed import config as run_file
    from fedmed.cli.display import bar

    config = run_file.load(path, assignments)
    from fedmed.federated.phantoms import with_phantoms

    with bar("phantom hospitals") as progress:
        return with_phantoms(config, progress, explicit=run_file.explicit_keys(config))


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from fedmed.cli.display import console, interval
    from fedmed.reporting.words import p_value

    names = [place["place"] for place in report["places"]]
    sites = [name for name in names if name != "server"]
    shown = (sites if len(sites) <= MOST_SITES else []) + [name for name in names if name == "server"]
    where = "mean of sites" if report["endpoint"] == "sites" else "server"
    table = Table("arm", f"{report['primary']}, {where}", *shown, "worst site", "steps", box=None)
    for arm in report["arms"]:
        worst = f"{arm['worst']['value']:.3f} {arm['worst']['site']}" if arm["worst"] else "-"
        cells = [_value(arm["places"][name]) for name in shown]
        steps = "-" if arm["steps"] is None else str(arm["steps"])
        table.add_row(arm["arm"], interval(arm["endpoint"]), *cells, worst, steps)
    seeds = len(report["seeds"])
    print(f"95 % intervals: {report['intervals']}, {seeds} seed{'s' if seeds > 1 else ''}")
    console().print(table)
    if report["comparisons"]:
        tests = Table("comparison", "difference", "p", "p, Holm", box=None)
        for one in report["comparisons"]:
            tests.add_row(
                f"{one['first']} vs {one['second']}", _difference(one), p_value(one["p"]), p_value(one["p_holm"])
            )
        console().print(tests)
    for note in report["notes"]:
        print(f"note: {note}")


def _value(found: dict[str, Any]) -> str:
    return "-" if found["value"] is None else f"{found['value']:.3f}"


def _difference(one: dict[str, Any]) -> str:
    if one["difference"] is None:
        return "undefined"
    spread = "" if one["low"] is None else f" ({one['low']:+.3f} to {one['high']:+.3f})"
    return f"{one['difference']:+.3f}{spread}"
