"""`fedmed simulate`: a whole federation on this machine."""

from __future__ import annotations

import enum
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedmed.config import RunConfig


class Engine(enum.StrEnum):
    """What runs the virtual hospitals."""

    local = "local"
    ray = "ray"


def simulate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN.toml]", help="a run file; without one, the demo")] = None,
    assignments: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="the run folder to make")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="continue the run in this folder")] = None,
    engine: Annotated[Engine, typer.Option(help="fedmed's own workers, or Flower's Ray")] = Engine.local,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, train nothing")] = False,
    log: Annotated[list[str], typer.Option(metavar="NAME", help="write events for tensorboard or mlflow too")] = [],  # noqa: B006  # typer copies it
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print result.json at the end")] = False,
) -> None:
    """Train a network across virtual hospitals on this machine, and report on it.

    Example: fedmed simulate phantoms/run.toml --set train.rounds=3 --set model.width=16 --out runs/first
    """
    from fedmed import config as run_file
    from fedmed.cli.display import bar
    from fedmed.errors import ConfigError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by a service manager: as by Ctrl-C
    if resume is not None and (run is not None or out is not None or assignments):
        raise ConfigError("--resume takes the run folder alone; its run.toml says the rest")
    path = resume / "run.toml" if resume is not None else run
    config = run_file.load(path, assignments) if path else run_file.validate(run_file.override({}, assignments))
    _check_writers(log)

    # A misspelt key is answered by now; what follows takes seconds to import.
    from fedmed.federated.phantoms import with_phantoms
    from fedmed.federated.run_folder import RunFolder, now

    with bar("phantom hospitals") as progress:
        config = with_phantoms(config, progress)
    parameters = _check(config)
    if dry_run:
        _show_plan(config, parameters)
        return
    if resume is not None:
        folder = RunFolder(resume)
    else:
        stamp = now()[:19].replace(":", "").replace("-", "")
        folder = RunFolder.create(out or Path("runs") / f"{stamp}-{config.name}".replace(" ", "-"), config)
    result = _run(config, folder, engine, log, quiet=quiet)
    _show_result(result, config, folder.path, as_json=as_json)


def _check(config: RunConfig) -> int:
    from fedmed.federated.simulation import check

    return check(config)


def _check_writers(log: list[str]) -> None:
    if log:
        from fedmed.reporting.writers import check_writers

        check_writers(log)


def _run(config: RunConfig, folder: Any, engine: Engine, log: list[str], *, quiet: bool) -> dict[str, Any]:
    from fedmed.cli.display import together, watching
    from fedmed.federated.simulation import local_grid, run_on, run_with_ray
    from fedmed.reporting import write_report
    from fedmed.reporting.writers import writing

    try:
        if engine is Engine.ray:
            with (
                writing(log, folder.path) as write,
                watching(config.train.rounds, config.primary, quiet=quiet) as watch,
            ):
                return run_with_ray(config, folder, together(watch, write))
        with (
            local_grid(config, folder) as grid,
            writing(log, folder.path) as write,
            watching(config.train.rounds, config.primary, quiet=quiet) as watch,
        ):
            return run_on(grid, config, folder, together(watch, write))
    finally:
        if (folder.path / "result.json").exists():
            write_report(folder.path)


def _show_plan(config: RunConfig, parameters: int) -> None:
    from rich.table import Table

    from fedmed.cli.display import console
    from fedmed.federated.simulation import devices, planned_sites, worker_count

    table = Table("site", "patients", "images")
    for name, patients, images in planned_sites(config):
        table.add_row(name, str(patients), str(images))
    console().print(table)
    workers = worker_count(config, devices(config))
    print(
        f"{config.model.name}: {parameters:,} parameters; {config.train.rounds} rounds in {workers} worker processes. "
        "Nothing was written."
    )


def _show_sites(result: dict[str, Any], primary: str) -> None:
    from rich.table import Table

    from fedmed.cli.display import console, interval

    table = Table("site", "patients", "images", "rounds", f"{primary} on its held-out patients", box=None)
    for site in result["sites"]:
        metric = interval(site["metrics"].get(primary))
        table.add_row(site["site"], *(str(site[key]) for key in ("patients", "images", "rounds_joined")), metric)
    console().print(table)


def _show_result(result: dict[str, Any], config: RunConfig, path: Path, *, as_json: bool) -> None:
    from fedmed.cli.display import interval
    from fedmed.errors import RunFailed

    if as_json:
        print(json.dumps(result))
    else:
        model = path / "model.json"
        best = f", the network of round {json.loads(model.read_text())['round']} kept" if model.exists() else ""
        print(f"{result['status']}: {result['rounds']} rounds{best}, {result['timing']['total_s']:.0f} s")
        primary = config.primary
        for name, metric in result["server"]["metrics"].items():
            if name == primary or name.startswith(f"{primary}/"):
                print(f"  {name:<24} {interval(metric)}")
        _show_sites(result, primary)
        if result["status"] == "degraded":
            print(f"  dropped: {result['reason']}")
        print(f"report: {path / 'report.html'}")
    if result["status"] in ("failed", "paused"):
        raise RunFailed(f"{result['status']}: {result['reason']}; kept in {path}")
