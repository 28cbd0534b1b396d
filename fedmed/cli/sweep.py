"""`fedmed sweep`: a grid of settings."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def sweep(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="a run file: what all points share")],
    vary: Annotated[list[str], typer.Option("--vary", metavar="KEY=a,b,c", help="a key and its values; repeatable")],
    assignments: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key")] = [],  # noqa: B006  # typer reads the default and never changes it
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="the experiment's folder, to be reused")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="runs at once; 0 = as cores and memory allow")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print sweep.json at the end")] = False,
) -> None:
    """Train every point of a grid with several seeds; one table, one plot. A sweep that was stopped goes on.

    Example: fedmed sweep run.toml --vary train.local-epochs=1,4 --vary train.learning-rate=1e-2,1e-3 --out sweeps/first
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from fedmed.cli.compare import resolved

    config = resolved(run, assignments)
    from fedmed.cli.experiment_progress import grid_progress
    from fedmed.experiments.sweep import sweep as run_sweep
    from fedmed.reporting.comparison import write_sweep

    folder = out or Path("runs") / f"{config.name}-experiment".replace(" ", "-")
    with grid_progress(quiet=quiet) as watch:
        report = run_sweep(config, vary, folder, home=run.absolute().parent, jobs=jobs, watch=watch)
    page = write_sweep(folder)
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
        print(f"table: {folder / 'sweep.csv'}\npage: {page}")
    for one in report["failures"]:
        print(f"error: {one['reason']}", file=sys.stderr)
    if report["failures"]:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from fedmed.cli.display import console, interval
    from fedmed.reporting.words import epsilon

    private = any(point["epsilon"] is not None for point in report["points"])
    where = "mean of sites" if report["endpoint"] == "sites" else "server"
    table = Table(*report["keys"], f"{report['primary']}, {where}", *(["ε spent"] if private else []), box=None)
    for point in report["points"]:
        spent = [epsilon(point["epsilon"])] if private else []
        value = "failed" if point["status"] == "failed" else interval(point["endpoint"])
        table.add_row(*(str(point["values"][key]) for key in report["keys"]), value, *spent)
    print(f"95 % intervals: {report['intervals']}, seeds: {len(report['seeds'])}")
    console().print(table)
